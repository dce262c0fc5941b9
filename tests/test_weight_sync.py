"""Weight sync: the plan as a pure function, the executor on real Gloo ranks with real Megatron shards.

That vLLM computes with what arrives is in ``test_two_branches.py`` and ``test_end_to_end.py``.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from copd_megatron.config.schema import ParallelConfig, RolloutConfig, WeightSyncConfig
from copd_megatron.hf.folder import HFFolder
from copd_megatron.hf.model_config import read_model_shape
from copd_megatron.model.shape import ModelShape
from copd_megatron.model.slots import slots
from copd_megatron.weight_sync.plan import SyncLayout, plan_sync, wanted_range
from tests.support.actors import make_actor, make_engine, random_prompts
from tests.support.distributed import run_distributed
from tests.support.layouts import EXPERTS, SEQUENCE, VIRTUAL, Job, run_layouts
from tests.support.models import make_model, reference_model
from tests.support.texts import random_texts

ELEMENT_BYTES = 4


def _dims(
    *, vocab: int = 321, kv_heads: int = 2, heads: int = 8, layers: int = 4, tied: bool = False
) -> ModelShape:
    return ModelShape(
        architecture="Qwen3ForCausalLM",
        num_layers=layers,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        head_dim=16,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


# ---- the plan ---------------------------------------------------------------------------------------------


def _vllm_rows(
    name: str, shape: tuple[int, ...], dims: ModelShape, rank: int, tp: int
) -> tuple[int, int, int] | None:
    """(dim, start, stop) that vLLM's tensor-parallel rank keeps, in vLLM's own words: column-parallel by
    rows, row-parallel by columns, key/value heads replicated when fewer than ranks, vocabulary padded to 64;
    None: the whole tensor."""
    if "norm" in name:
        return None
    if "embed_tokens" in name or "lm_head" in name:
        padded = (shape[0] + 63) // 64 * 64
        per_rank = padded // tp
        return 0, min(rank * per_rank, shape[0]), min((rank + 1) * per_rank, shape[0])
    if "o_proj" in name or "down_proj" in name:
        per_rank = shape[1] // tp
        return 1, rank * per_rank, (rank + 1) * per_rank
    if "k_proj" in name or "v_proj" in name:
        heads = max(1, dims.num_query_groups // tp)
        first = rank // max(1, tp // dims.num_query_groups) * heads
        return 0, first * dims.head_dim, (first + heads) * dims.head_dim
    per_rank = shape[0] // tp
    return 0, rank * per_rank, (rank + 1) * per_rank


def _megatron_rows(name: str, shape: tuple[int, ...], tp_rank: int, tp: int) -> tuple[int, int, int] | None:
    """(dim, start, stop) that a Megatron rank holds."""
    if "norm" in name:
        return None
    dim = 1 if "o_proj" in name or "down_proj" in name else 0
    share = math.ceil(shape[dim] / tp)
    return dim, min(tp_rank * share, shape[dim]), min((tp_rank + 1) * share, shape[dim])


def _stage_of(name: str, dims: ModelShape, pp: int) -> int:
    if name.startswith("model.layers."):
        return int(name.split(".")[2]) // (dims.num_layers // pp)
    return 0 if "embed_tokens" in name else pp - 1


def _check_plan(
    dims: ModelShape, layout: SyncLayout, bucket_bytes: int, destinations: list[int] | None
) -> None:
    buckets = plan_sync(
        dims, layout, bucket_bytes=bucket_bytes, element_bytes=ELEMENT_BYTES, destinations=destinations
    )
    assert buckets == plan_sync(
        dims, layout, bucket_bytes=bucket_bytes, element_bytes=ELEMENT_BYTES, destinations=destinations
    )
    shapes = {s.name: s.shape for s in slots(dims, layout.pp)}
    carried = [slot.name for bucket in buckets for slot in bucket.slots]
    assert sorted(carried) == sorted(shapes), "every tensor in one bucket, once"
    receivers = list(range(layout.world_size)) if destinations is None else destinations

    # the executor's effect: NaN where nothing arrives, else the value of the element itself
    arrays = {(name, dst): np.full(shape, np.nan) for name, shape in shapes.items() for dst in receivers}
    for bucket in buckets:
        for transfer in bucket.transfers:
            name = transfer.slot.name
            assert name in {slot.name for slot in bucket.slots}
            tp_rank, _, stage = layout.coordinates(transfer.src)
            assert stage == _stage_of(name, dims, layout.pp), "a stage sends what it holds"
            target = arrays[name, transfer.dst]
            owned = _megatron_rows(name, shapes[name], tp_rank, layout.tp)
            where: Any = slice(None)
            if owned is not None:
                dim, start, stop = owned
                assert transfer.start is not None
                assert transfer.stop is not None
                assert start <= transfer.start < transfer.stop <= stop, "a rank sends rows that it holds"
                where = (slice(None),) * dim + (slice(transfer.start, transfer.stop),)
            assert np.isnan(target[where]).all(), "no element arrives twice"
            target[where] = 1.0
            if transfer.src != transfer.dst:
                own_tp, _, own_stage = layout.coordinates(transfer.dst)
                mine = _megatron_rows(name, shapes[name], own_tp, layout.tp)
                holds = own_stage == stage and (
                    mine is None or not (mine[2] <= transfer.start or transfer.stop <= mine[1])
                )
                assert not holds, "what a rank holds does not travel to it"

    for (name, dst), array in arrays.items():
        wanted = np.full(shapes[name], np.nan)
        rows = _vllm_rows(name, shapes[name], dims, dst % layout.rollout_tp, layout.rollout_tp)
        if rows is None:
            wanted[...] = 1.0
        else:
            wanted[(slice(None),) * rows[0] + (slice(rows[1], rows[2]),)] = 1.0
        np.testing.assert_array_equal(array, wanted, err_msg=f"{name} on rank {dst}")


LAYOUTS = [
    SyncLayout(tp=tp, pp=pp, dp=dp, rollout_tp=rollout_tp)
    for tp, pp, dp, rollout_tp in itertools.product((1, 2), (1, 2, 4), (1, 2, 3), (1, 2, 4, 8))
    if (tp * pp * dp) % rollout_tp == 0
]


@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda it: f"tp{it.tp}-pp{it.pp}-dp{it.dp}-rollout{it.rollout_tp}"
)
def test_plan_fills_exactly_what_each_vllm_rank_keeps(layout: SyncLayout) -> None:
    for tied in (True, False):
        _check_plan(_dims(tied=tied), layout, 50_000, None)


@settings(max_examples=60, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 3]),
    dp=st.integers(1, 3),
    rollout_tp=st.sampled_from([1, 2, 4, 8]),
    kv_heads=st.sampled_from([4, 8]),
    vocab=st.integers(60, 400),
    bucket_bytes=st.integers(1, 400_000),
    tied=st.booleans(),
    data=st.data(),
)
def test_plan_properties(
    tp: int, pp: int, dp: int, rollout_tp: int, kv_heads: int, vocab: int, bucket_bytes: int, tied: bool,
    data: st.DataObject,
) -> None:  # fmt: skip
    layout = SyncLayout(tp=tp, pp=pp, dp=dp, rollout_tp=rollout_tp)
    assume(layout.world_size % rollout_tp == 0)
    dims = _dims(vocab=vocab, kv_heads=kv_heads, layers=6, tied=tied)
    destinations = data.draw(
        st.none() | st.lists(st.integers(0, layout.world_size - 1), min_size=1, unique=True)
    )
    _check_plan(dims, layout, bucket_bytes, destinations)


@settings(max_examples=100, deadline=None)
@given(bucket_bytes=st.integers(1, 600_000), vocab=st.integers(60, 2000), pp=st.sampled_from([1, 2]))
def test_buckets_are_bounded_and_keep_fused_parameters_together(
    bucket_bytes: int, vocab: int, pp: int
) -> None:
    dims = _dims(vocab=vocab)
    buckets = plan_sync(
        dims,
        SyncLayout(tp=2, pp=pp, dp=1, rollout_tp=1),
        bucket_bytes=bucket_bytes,
        element_bytes=ELEMENT_BYTES,
    )
    homes = defaultdict(set)
    for number, bucket in enumerate(buckets):
        groups = {slot.group for slot in bucket.slots}
        for group in groups:
            homes[group].add(number)
        size = sum(math.prod(slot.shape) for slot in bucket.slots) * ELEMENT_BYTES
        assert size <= bucket_bytes or len(groups) == 1
    assert all(len(numbers) == 1 for numbers in homes.values())
    # no bucket could have taken in the one after it
    sizes = [sum(math.prod(s.shape) for s in b.slots) * ELEMENT_BYTES for b in buckets]
    first_groups = [
        sum(math.prod(s.shape) for s in b.slots if s.group == b.slots[0].group) * ELEMENT_BYTES
        for b in buckets
    ]
    assert all(
        size + following > bucket_bytes for size, following in zip(sizes, first_groups[1:], strict=False)
    )


def test_data_parallel_copies_share_the_sending() -> None:
    """Two replicas: each serves its own ranks, so no rank sends twice as much as another."""
    layout = SyncLayout(tp=2, pp=2, dp=2, rollout_tp=1)
    sent: dict[int, int] = defaultdict(int)
    for bucket in plan_sync(_dims(), layout, bucket_bytes=10**9, element_bytes=ELEMENT_BYTES):
        for transfer in bucket.transfers:
            if transfer.src != transfer.dst:
                assert layout.coordinates(transfer.src)[1] == layout.coordinates(transfer.dst)[1]
                sent[transfer.src] += math.prod(transfer.slot.shape)
    assert sorted(sent) == list(range(8))
    by_replica = [sum(n for rank, n in sent.items() if layout.coordinates(rank)[1] == dp) for dp in (0, 1)]
    assert by_replica[0] == by_replica[1]


@pytest.mark.parametrize(
    ("layout", "dims", "message"),
    [
        (SyncLayout(tp=2, pp=1, dp=1, rollout_tp=4), _dims(), "must divide the branch's 2 ranks"),
        (SyncLayout(tp=1, pp=1, dp=3, rollout_tp=3), _dims(), "8 attention heads"),
        (SyncLayout(tp=1, pp=1, dp=4, rollout_tp=4), _dims(kv_heads=6, heads=12), "6 key/value heads"),
    ],
    ids=["ranks", "heads", "key-value heads"],
)
def test_impossible_rollout_layouts_are_refused(layout: SyncLayout, dims: ModelShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_sync(dims, layout, bucket_bytes=10**6, element_bytes=ELEMENT_BYTES)


# ---- the executor ---------------------------------------------------------------------------------------

EXECUTED = [
    # (tp, pp, dp), rollout tp
    ((2, 1, 1), 1),
    ((2, 1, 1), 2),
    ((1, 2, 1), 1),
    ((2, 2, 1), 2),
    ((1, 1, 2), 2),
    ((2, 1, 2), 4),  # more ranks than key/value heads
]
KINDS = ("tied", "untied")
BUCKET_BYTES = 50_000


def _stream(parallel: ParallelConfig, folder: Path, rollout_tp: int, out: Path) -> dict[str, Any]:
    """Streams doubled weights (so live ones, not the folder's) and compares them with the folder; exports."""
    import torch.distributed as dist

    from copd_megatron.weight_sync.export import export_hf
    from copd_megatron.weight_sync.stream import ShardStream

    actor = make_actor(parallel, folder)
    with torch.no_grad():
        for parameter in actor.model.parameters():
            parameter.mul_(2)
    stream = ShardStream(actor, rollout_tp=rollout_tp, bucket_bytes=BUCKET_BYTES)
    source, seen, largest, filled = HFFolder(folder), [], 0, 0

    def check(name: str, tensor: torch.Tensor, *, nothing_else: bool) -> int:
        slot = next(s for s in actor.view.table if s.name == name)
        wanted = wanted_range(slot, actor.dims, dist.get_rank() % rollout_tp, rollout_tp)
        part = (slice(None),) * (slot.dim or 0) + (slice(*(wanted or (None,))),)
        expected = source.read(name) * 2
        assert tensor.shape == expected.shape
        assert torch.equal(tensor[part], expected[part]), f"{name}: other values"
        if nothing_else:
            assert int((~tensor.isnan()).sum()) == expected[part].numel(), f"{name}: other rows than wanted"
        return expected[part].numel() * expected.element_size()

    # torch now fills what torch.empty returns with NaN
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    kept = dict(stream.tensors(lasting=True))
    torch.use_deterministic_algorithms(False)
    for name, tensor in kept.items():
        filled += check(name, tensor, nothing_else=True)
    for _ in range(2):
        seen = []
        for bucket in stream.buckets_filled():
            largest = max(largest, sum(t.numel() * t.element_size() for t in bucket.values()))
            for name, tensor in bucket.items():
                check(name, tensor, nothing_else=False)
                seen.append(name)
        assert sorted(seen) == sorted(kept) == source.names()
    export_hf(actor, out, source=folder, shard_bytes=BUCKET_BYTES)
    return {
        "largest": largest,
        "filled": stream.filled_bytes,
        "expected_filled": filled,
        "received": stream.received_bytes,
        "buckets": len(stream.buckets),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sync")
    return {kind: make_model(root / kind, seed=3, tie_word_embeddings=kind == "tied") for kind in KINDS}


def _export_folder(folders: dict[str, Path], kind: str, number: int) -> Path:
    return folders[kind].parent / "export" / f"{kind}-{number}"


@pytest.fixture(scope="module")
def streamed(folders: dict[str, Path]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    keys = [(kind, number) for kind in KINDS for number in range(len(EXECUTED))]
    # a folder of this name from before, to be replaced
    old = _export_folder(folders, *keys[0])
    old.mkdir(parents=True)
    (old / "stale.txt").write_text("of an earlier export")
    jobs = []
    for kind, number in keys:
        (tp, pp, dp), rollout_tp = EXECUTED[number]
        arguments = (folders[kind], rollout_tp, _export_folder(folders, kind, number))
        jobs.append(Job(tp=tp, pp=pp, dp=dp, args=arguments))
    return dict(zip(keys, run_layouts(_stream, jobs), strict=True))


each_case = pytest.mark.parametrize(
    "number",
    range(len(EXECUTED)),
    ids=["tp{}-pp{}-dp{}-rollout{}".format(*sizes, r) for sizes, r in EXECUTED],
)
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@each_case
def test_each_rank_gets_the_live_rows_it_wants_and_no_others(
    streamed: dict[Any, list[dict[str, Any]]], kind: str, number: int
) -> None:
    """The ranks compare every element with the folder; an assertion there fails the launch."""
    for rank in streamed[kind, number]:
        assert rank["filled"] == rank["expected_filled"]
        assert rank["received"] < rank["filled"]
        assert rank["buckets"] > 5


@each_kind
@each_case
def test_buckets_on_the_wire_are_bounded(
    streamed: dict[Any, list[dict[str, Any]]], folders: dict[str, Path], kind: str, number: int
) -> None:
    source = HFFolder(folders[kind])
    largest_group = max(
        sum(source.spec(s.name).num_bytes for s in members)
        for members in _groups(read_model_shape(folders[kind])).values()
    )
    for rank in streamed[kind, number]:
        assert rank["largest"] <= max(BUCKET_BYTES, largest_group)


def _groups(dims: ModelShape) -> dict[str, list[Any]]:
    groups = defaultdict(list)
    for slot in slots(dims, 1):
        groups[slot.group].append(slot)
    return groups


def test_one_replica_per_rank_moves_only_the_other_half(streamed: dict[Any, list[dict[str, Any]]]) -> None:
    """TP 2 to whole replicas: of the split tensors (nearly everything) each rank has half already; TP 2 to
    TP 2 moves nothing but what the two paddings of the vocabulary shift."""
    whole, matched = streamed["untied", 0][0], streamed["untied", 1][0]
    assert whole["received"] == pytest.approx(whole["filled"] / 2, rel=0.02)
    assert matched["received"] < 0.15 * matched["filled"]


@each_kind
@each_case
def test_export_loads_in_transformers_with_the_live_weights(
    streamed: dict[Any, list[dict[str, Any]]], folders: dict[str, Path], kind: str, number: int
) -> None:
    out = _export_folder(folders, kind, number)
    assert not out.with_name(out.name + ".partial").exists()
    assert not (out / "stale.txt").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(HFFolder(folders[kind]).names())
    assert len(set(index["weight_map"].values())) == streamed[kind, number][0]["buckets"]
    original, exported = reference_model(folders[kind]).state_dict(), reference_model(out).state_dict()
    assert list(exported) == list(original)
    for name, tensor in exported.items():
        assert torch.equal(tensor, original[name] * 2), name
    text = random_texts(1, 321)[0]
    ids = torch.from_numpy(text.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        assert reference_model(out)(input_ids=ids).logits.isfinite().all()
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert (out / "tokenizer.json").read_bytes() == (folders[kind] / "tokenizer.json").read_bytes()


def test_layouts_reach_every_rank_of_a_sync(layout_models: dict[str, Path], tmp_path: Path) -> None:
    """Chunks, experts and context parallel ranks, streamed and exported; the ranks compare every element."""
    cases = [
        ("mixture", Job(dp=2, also=EXPERTS, args=(layout_models["mixture"], 1, tmp_path / "0"))),
        ("mixture", Job(pp=2, dp=2, also=EXPERTS, args=(layout_models["mixture"], 2, tmp_path / "1"))),
        ("dense", Job(pp=2, also=VIRTUAL, args=(layout_models["dense"], 1, tmp_path / "2"))),
        ("dense", Job(tp=2, cp=2, also=SEQUENCE, args=(layout_models["dense"], 2, tmp_path / "3"))),
    ]
    for ranks in run_layouts(_stream, [job for _, job in cases]):
        assert all(rank["filled"] == rank["expected_filled"] for rank in ranks)
    for number, (kind, _) in enumerate(cases):
        original = reference_model(layout_models[kind]).state_dict()
        exported = reference_model(tmp_path / str(number)).state_dict()
        assert list(exported) == list(original)
        for name, tensor in exported.items():
            assert torch.equal(tensor, original[name] * 2), name


# ---- with vLLM -------------------------------------------------------------------------------------------


def _largest_logprob_error(folder: Path) -> float:
    """Largest difference between vLLM's and the actor's log-probabilities of sampled tokens, after a sync of
    weights that differ from the folder's."""
    from copd_megatron.rollout.engine import SamplingSettings
    from copd_megatron.weight_sync.sync import WeightSync

    torch.distributed.init_process_group("gloo")
    actor = make_actor(ParallelConfig(data_parallel_size=2, expert_model_parallel_size=2), folder)
    with torch.no_grad():
        for parameter in actor.model.parameters():
            parameter.mul_(1.1)
    engine = make_engine(folder, RolloutConfig(max_new_tokens=12, max_num_seqs=8))
    WeightSync(actor, engine, WeightSyncConfig())()
    settings = SamplingSettings(num_generations=2, temperature=1.0)
    rollouts = engine.sample(random_prompts(6, length=9), settings, step=0)
    scores = actor.log_probs(rollouts)
    return max(
        float(np.abs(score.logprobs - rollout.rollout_logprobs).max())
        for score, rollout in zip(scores, rollouts, strict=True)
    )


@pytest.mark.slow
def test_vllm_agrees_on_a_mixture_of_experts(layout_models: dict[str, Path]) -> None:
    folder = layout_models["mixture"]
    for error in run_distributed(_largest_logprob_error, 2, args=(folder,), timeout=400, megatron=True):
        assert error < 1e-3
