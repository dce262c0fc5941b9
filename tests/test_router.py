"""The router: wire format without processes, exchanges on real Gloo ranks of unequal branches."""

from __future__ import annotations

import json
import os
import signal
import time
import zlib
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.config.graph import Edge, Graph, build_graph
from copd_megatron.config.schema import BranchConfig, Config, EdgeConfig, OPDConfig, Topology
from copd_megatron.opd.plan import split_rows
from copd_megatron.opd.records import ScoreRequest, TeacherScore
from copd_megatron.opd.router import Router
from copd_megatron.opd.wire import (
    HEADER_BYTES,
    REQUESTS,
    Header,
    Message,
    RouterError,
    check_ids,
    check_scores,
    ids_crc,
    pack_requests,
    pack_scores,
    unpack_requests,
    unpack_scores,
)
from copd_megatron.planner.traffic import router_bytes
from copd_megatron.records import Ask, MediaRef, TopK
from copd_megatron.topology.watch import EXIT_STUCK, CollectiveError
from copd_megatron.topology.world import World, init_world
from tests.support.distributed import launch_distributed, run_distributed

VOCAB = 50
BRANCHES = {"text": (0, 1), "image": (2,), "video": (3, 4, 5)}
ROW_TABLE_BYTES = (12 + 11) * 8


def _graph(topology: Topology, *names: str, frozen: tuple[str, ...] = ()) -> Graph:
    branches = {name: BranchConfig(frozen=name in frozen, num_prompts_per_step=3) for name in names}
    return build_graph(Config(branches=branches, opd=OPDConfig(topology=topology)))


def _rows(edge: Edge, num_rows: int, *, seed: int = 0, num_states: int = 2) -> list[ScoreRequest]:
    """Random rows of unequal lengths, the same on every rank of the student."""
    rng = np.random.default_rng([seed, *edge.name.encode()])
    rows = []
    for i in range(num_rows):
        prompt, response = int(rng.integers(1, 9)), int(rng.integers(1, 40))
        states = rng.choice(response, size=min(num_states, response), replace=False)
        rows.append(
            ScoreRequest(
                row_id=1000 + 7 * i,
                token_ids=rng.integers(0, VOCAB, prompt + response).astype(np.int32),
                prompt_length=prompt,
                weight_version=seed,
                ask=Ask(tokens=True, positions=tuple(sorted(states.tolist()))),
            )
        )
    return rows


def _logits(branch: str, token_ids: np.ndarray) -> np.ndarray:
    """[L, V] of a small causal model whose weights the branch's name determines."""
    rng = np.random.default_rng(zlib.crc32(branch.encode()))
    table = rng.normal(size=(VOCAB, VOCAB))
    decay = 0.5 ** np.arange(len(token_ids))
    hidden = np.array(
        [(table[token_ids[: i + 1]] * decay[: i + 1][::-1, None]).sum(0) for i in range(len(token_ids))]
    )
    return hidden - np.log(np.exp(hidden).sum(-1, keepdims=True))


def _score(branch: str, rows: list[ScoreRequest], version: int = 5) -> list[TeacherScore]:
    """The branch's scores, computed directly."""
    scores = []
    for row in rows:
        logp = _logits(branch, row.token_ids)[row.prompt_length - 1 : -1]
        response = row.token_ids[row.prompt_length :]
        nothing = np.empty(0, np.float32)
        logprobs = logp[np.arange(len(response)), response].astype(np.float32)
        scores.append(
            TeacherScore(
                row_id=row.row_id,
                logprobs=logprobs if row.ask.tokens else nothing,
                weight_version=version,
                distributions=logp[list(row.ask.positions)].astype(np.float32),
            )
        )
    return scores


def _same(got: list[TeacherScore], expected: list[TeacherScore]) -> bool:
    return len(got) == len(expected) and all(
        g.row_id == e.row_id
        and g.weight_version == e.weight_version
        and np.array_equal(g.logprobs, e.logprobs)
        and np.array_equal(g.distributions, e.distributions)
        for g, e in zip(got, expected, strict=True)
    )


# Wire format.


def test_a_question_about_positions_alone_brings_no_log_probabilities_back() -> None:
    rows = [replace(row, ask=replace(row.ask, tokens=False)) for row in _rows(EDGE, 3)]
    out = pack_requests(rows, (0, 1, 2), exchange=1, edge=0, lane=0)
    asked = unpack_requests(out, "here")
    scores = _score("b", [asked[i] for i in range(3)])
    for row, score in zip(rows, scores, strict=True):
        assert len(score.logprobs) == 0
        assert score.distributions.shape == (len(row.ask.positions), VOCAB)
    check_scores(rows, scores, "here")
    with pytest.raises(RouterError, match="a teacher must answer its rows in their order, in full"):
        check_scores(_rows(EDGE, 3), scores, "here")


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(0, 12),
    num_lanes=st.integers(1, 4),
    seed=st.integers(0, 99),
    states=st.integers(0, 5),
)
def test_packing_and_unpacking_every_lane_restores_rows_and_scores(
    num_rows: int, num_lanes: int, seed: int, states: int
) -> None:
    edge = Edge(student="a", teacher="b", prompts="b", beta=1.0, num_prompts=1, num_generations=1)
    rows = _rows(edge, num_rows, seed=seed, num_states=states)
    scores = _score("b", rows)
    got_rows: dict[int, ScoreRequest] = {}
    got_scores: dict[int, TeacherScore] = {}
    for lane, positions in enumerate(split_rows([len(r.token_ids) for r in rows], num_lanes)):
        out = pack_requests(rows, positions, exchange=1, edge=2, lane=lane)
        assert out.header.payload_bytes == out.payload.nbytes
        got_rows |= unpack_requests(out, "here")
        back = pack_scores(scores, positions, exchange=1, edge=2, lane=lane, crc=out.header.ids_crc)
        got_scores |= unpack_scores(back, "here")
    assert sorted(got_rows) == sorted(got_scores) == list(range(num_rows))
    for i, row in enumerate(rows):
        got = got_rows[i]
        assert np.array_equal(got.token_ids, row.token_ids) and got.token_ids.dtype == np.int32
        assert got.ask == row.ask
        assert (got.row_id, got.prompt_length, got.weight_version) == (row.row_id, row.prompt_length, seed)
    assert _same([got_scores[i] for i in range(num_rows)], scores)


EDGE = Edge(student="a", teacher="b", prompts="b", beta=1.0, num_prompts=1, num_generations=1)


def _message() -> Message:
    return pack_requests(_rows(EDGE, 3), (0, 1, 2), exchange=4, edge=0, lane=0)


def test_a_damaged_message_is_an_error_that_names_its_origin() -> None:
    message = _message()
    payload = message.payload.copy()
    payload[3 * 12 * 8 + 5] ^= 1
    with pytest.raises(RouterError, match=r"edge a<-b.*bytes arrived with CRC"):
        unpack_requests(Message(header=message.header, payload=payload), "edge a<-b lane 0")
    shorter, longer = message.payload[:-4], np.concatenate([message.payload, np.zeros(4, np.uint8)])
    for payload in (shorter, longer):
        with pytest.raises(RouterError, match=r"has \d+ bytes, its header promises"):
            unpack_requests(Message(header=message.header, payload=payload), "x")
    with pytest.raises(RouterError, match=r"the payload of \d+ bytes ends before byte \d+"):
        unpack_requests(_sealed(message.header, shorter), "x")
    with pytest.raises(RouterError, match=r"has \d+ bytes, its row table promises"):
        unpack_requests(_sealed(message.header, longer), "x")


def _sealed(header: Header, payload: np.ndarray) -> Message:
    """A message whose header fits a payload, whatever the payload holds."""
    header = replace(header, payload_bytes=payload.nbytes, payload_crc=zlib.crc32(payload))
    return Message(header=header, payload=payload)


def test_one_bit_anywhere_is_noticed() -> None:
    rows = _rows(EDGE, 2)
    asked = pack_requests(rows, (0, 1), exchange=1, edge=0, lane=0)
    told = pack_scores(_score("b", rows), (0, 1), exchange=1, edge=0, lane=0, crc=asked.header.ids_crc)
    for message, unpack in ((asked, unpack_requests), (told, unpack_scores)):
        for place in range(0, message.payload.nbytes, 3):
            payload = message.payload.copy()
            payload[place] ^= 1
            with pytest.raises(RouterError, match=r"edge a<-b.*arrived with CRC"):
                unpack(Message(header=message.header, payload=payload), "edge a<-b")


@pytest.mark.parametrize("wrap", [2**62, 2**33, -1])
def test_a_row_table_that_makes_no_sense_names_its_sender(wrap: int) -> None:
    rows = _rows(EDGE, 3)
    told = pack_scores(_score("b", rows), (0, 1, 2), exchange=1, edge=0, lane=0, crc=0)
    for column in (3, 4, 5, 7, 8, 9, 10):
        payload = told.payload.copy()
        payload.view("<i8")[: 3 * 11].reshape(3, 11)[1, column] = wrap
        with pytest.raises(RouterError, match="edge a<-b"):
            found = unpack_scores(_sealed(told.header, payload), "edge a<-b")
            check_scores(rows, [found[i] for i in range(3)], "edge a<-b")


@pytest.mark.parametrize("name", ["num_rows", "edge_rows", "payload_bytes", "media_bytes"])
@pytest.mark.parametrize("value", [-1, 2**62])
def test_counts_that_are_none_ask_for_no_memory(name: str, value: int) -> None:
    header = replace(_message().header, **{name: value})
    with pytest.raises(RouterError, match=f"edge a<-b: header field {name} is {value}"):
        Header.unpack(header.pack(), "edge a<-b")


@pytest.mark.parametrize("head", [{"rows": [[-1]]}, {"rows": [[1]]}, {"sizes": [-5]}, {"refs": [[1] * 6]}])
def test_a_media_section_of_another_form_names_its_sender(head: dict[str, Any]) -> None:
    ref = MediaRef(source="s", shard="t", key="k", extension="png", kind="image", content_hash="h")
    row = replace(_rows(EDGE, 1)[0], media=(ref,))
    message = pack_requests([row], (0,), exchange=1, edge=0, lane=0)
    assert unpack_requests(message, "x")[0].media == (ref,)
    plain = message.payload[: -message.header.media_bytes]
    text = json.dumps({"refs": [astuple(ref)], "rows": [[0]], "sizes": [0], **head}).encode()
    section = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    spoilt = _sealed(replace(message.header, media_bytes=section.nbytes), np.concatenate([plain, section]))
    with pytest.raises(RouterError, match="edge a<-b"):
        unpack_requests(spoilt, "edge a<-b")


def test_ids_outside_the_vocabulary_are_refused() -> None:
    (row,) = _rows(EDGE, 1)
    (score,) = _score("b", [row])
    check_ids([row], VOCAB, "x")
    spoilt: list[ScoreRequest | TeacherScore] = []
    for wrong in (-2, VOCAB, 2**31 - 1):
        ids = row.token_ids.copy()
        ids[-1] = wrong
        spoilt += [
            replace(row, token_ids=ids),
            replace(row, support_ids=np.full((row.response_length, 1), wrong, np.int32)),
            replace(score, samples=(ids,)),
            replace(score, top=TopK(ids=ids[None], logprobs=np.zeros((1, len(ids)), np.float32))),
        ]
    for one in spoilt:
        with pytest.raises(RouterError, match=rf"x: .* of row 1000 lie in .*0 .. {VOCAB - 1}"):
            check_ids([one], VOCAB, "x")
    check_ids([replace(row, support_ids=np.full((row.response_length, 1), -1, np.int32))], VOCAB, "x")


@pytest.mark.parametrize(
    ("field", "value"),
    [("magic", 1), ("format_version", 1), ("kind", 1), ("exchange", 5), ("edge", 3), ("lane", 1)],
)
def test_a_header_of_another_message_is_refused(field: str, value: int) -> None:
    expected = {"kind": REQUESTS, "exchange": 4, "edge": 0, "lane": 0}
    header = _message().header
    assert Header.unpack(header.pack(), "x", **expected) == header
    wrong = replace(header, **{field: value})
    with pytest.raises(RouterError, match=f"edge a<-b, rank 3: header field {field} is {value}, expected"):
        Header.unpack(wrong.pack(), "edge a<-b, rank 3", **expected)


def test_the_crc_covers_lengths_as_well_as_ids() -> None:
    rows = _rows(EDGE, 2)
    moved = replace(rows[0], prompt_length=rows[0].prompt_length + 1)
    assert ids_crc(rows) != ids_crc([moved, rows[1]])
    assert ids_crc(rows) != ids_crc(rows[::-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_length": 0}, "row 1000: prompt_length is 0"),
        ({"prompt_length": 10_000}, "prompt_length is 10000 in a row of"),
        ({"ask": Ask(positions=(-1,))}, r"asked positions \[-1\] must lie in 0 .."),
        ({"ask": Ask(positions=(900,))}, r"asked positions \[900\]"),
        ({"ask": Ask(samples=1 << 40)}, "nobody can answer"),
        ({"ask": Ask(samples=-1)}, "nobody can answer"),
        ({"ask": Ask(samples=1, max_new_tokens=1 << 40)}, "nobody can answer"),
        ({"ask": Ask(top_k=-1)}, "likeliest -1 ids"),
        ({"ask": Ask(temperature=0.0)}, "at temperature 0 "),
        ({"ask": Ask(temperature=float("nan"))}, "at temperature nan"),
    ],
)
def test_rows_that_no_teacher_could_score_are_refused_before_they_leave(
    change: dict[str, Any], message: str
) -> None:
    row = replace(_rows(EDGE, 1)[0], **change)
    with pytest.raises(RouterError, match=message):
        pack_requests([row], (0,), exchange=1, edge=0, lane=0)


def _with(score: TeacherScore, value: float) -> TeacherScore:
    """The score with another number in its first distribution."""
    distributions = score.distributions.copy()
    distributions[0, 3] = value
    return replace(score, distributions=distributions)


def test_a_sample_is_no_longer_than_was_asked() -> None:
    row = replace(_rows(EDGE, 1)[0], ask=Ask(samples=1, max_new_tokens=3))
    for length in (3, 4):
        score = TeacherScore(row_id=row.row_id, weight_version=1, samples=(np.zeros(length, np.int32),))
        if length == 3:
            check_scores([row], [score], "x")
        else:
            with pytest.raises(RouterError, match="x: a sample of row 1000 has 4 tokens, 3 were asked"):
                check_scores([row], [score], "x")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s[:-1], "2 scores for 3 rows"),
        (lambda s: s[::-1], "a teacher must answer its rows in their order"),
        (lambda s: [replace(s[0], logprobs=s[0].logprobs[1:]), *s[1:]], "in full"),
        (lambda s: [replace(s[0], distributions=s[0].distributions[:1]), *s[1:]], "in full"),
        (lambda s: [replace(s[0], logprobs=s[0].logprobs * np.nan), *s[1:]], "token 0 in row 1000 is nan"),
        (
            lambda s: [_with(s[0], -np.inf), *s[1:-1], _with(s[-1], np.inf)],
            "is inf",
        ),
        (lambda s: [_with(s[0], 1.0), *s[1:]], "in row 1000 is 1;"),
        (lambda s: [_with(s[0], np.nan), *s[1:]], "in row 1000 is nan"),
        (lambda s: [replace(s[0], samples=(np.zeros(2, np.int32),)), *s[1:]], "in full"),
        (lambda s: [replace(s[0], weight_version=4), *s[1:]], r"weight versions \[4, 5\]"),
    ],
)
def test_scores_that_do_not_answer_their_rows_are_refused(
    spoil: Callable[[list[TeacherScore]], list[TeacherScore]], message: str
) -> None:
    rows = _rows(EDGE, 3)
    check_scores(rows, _score("b", rows), "x")
    with pytest.raises(RouterError, match=message):
        check_scores(rows, spoil(_score("b", rows)), "x")


# Exchanges.


def _join(branches: dict[str, tuple[int, ...]], timeout: float = 60.0) -> World:
    return init_world(branches, device="cpu", timeout_seconds=timeout, run_id="test")


def _exchange(world: World, router: Router, num_rows: Callable[[Edge], int], seed: int) -> dict[str, Any]:
    """One exchange, checked against scores computed directly; what the parent asserts on."""
    me = world.branch
    outgoing = {edge: _rows(edge, num_rows(edge), seed=seed) for edge in router.graph.into(me)}
    seen: dict[str, list[int]] = {}

    def score(edge: Edge, rows: list[ScoreRequest]) -> list[TeacherScore]:
        assert edge.teacher == me
        seen[edge.name] = [row.row_id for row in rows]
        assert all(row.weight_version == seed for row in rows)
        return _score(me, rows, version=seed + 10)

    scores = router.exchange(outgoing, score)
    assert list(scores) == list(router.graph.into(me))
    traffic = {edge.name: t for edge, t in router.traffic.items()}
    return {
        "right": all(_same(scores[e], _score(e.teacher, outgoing[e], version=seed + 10)) for e in scores),
        "swapped": any(
            _same(scores[e], _score(e.student, outgoing[e], version=seed + 10)) for e in scores if outgoing[e]
        ),
        "seen": seen,
        "expected_seen": {
            e.name: [1000 + 7 * i for i in range(num_rows(e))] for e in router.graph.out_of(me) if num_rows(e)
        },
        "num_rows": {name: t.num_rows for name, t in traffic.items()},
        "sent": {name: t.sent_bytes for name, t in traffic.items()},
        "received": {name: t.received_bytes for name, t in traffic.items()},
    }


def _run_exchanges() -> list[dict[str, Any]]:
    results = []
    with _join(BRANCHES) as world:
        everyone = Router(world, _graph(Topology.all_to_all, *BRANCHES))
        for step in range(3):
            results.append(_exchange(world, everyone, lambda edge: 5 + len(edge.name), seed=step))
        # Fewer rows than lanes, none at all, and only some edges with rows.
        results.append(_exchange(world, everyone, lambda edge: 1, seed=3))
        results.append(_exchange(world, everyone, lambda edge: 0, seed=4))
        results.append(_exchange(world, everyone, lambda edge: 9 if edge.teacher == "video" else 0, seed=5))
        hub = Router(world, _graph(Topology.hub_and_spoke, *BRANCHES))
        results.append(_exchange(world, hub, lambda edge: 8, seed=6))
        frozen = Router(world, _graph(Topology.all_to_all, *BRANCHES, frozen=("video",)))
        results.append(_exchange(world, frozen, lambda edge: 8, seed=7))
        pair = Graph(tuple(BRANCHES), _graph(Topology.all_to_all, "text", "image").edges)
        results.append(_exchange(world, Router(world, pair), lambda edge: 8, seed=8))
    return results


@pytest.fixture(scope="module")
def exchanges() -> list[list[dict[str, Any]]]:
    """Results by rank, then exchange."""
    return run_distributed(_run_exchanges, 6)


def test_scores_that_arrive_equal_scores_computed_directly_on_the_teacher(
    exchanges: list[list[dict[str, Any]]],
) -> None:
    for rank, results in enumerate(exchanges):
        for step, result in enumerate(results):
            assert result["right"], f"rank {rank}, exchange {step}"
            assert not result["swapped"], "the student's own scores must not pass for the teacher's"
            assert result["seen"] == result["expected_seen"], "score is called on every rank, rows in order"
    for step in range(len(exchanges[0])):
        sent, received = (
            sum(sum(results[step][what].values()) for results in exchanges) for what in ("sent", "received")
        )
        assert sent == received > 0
    # Nobody in the last exchange but text and image.
    assert exchanges[4][-1]["num_rows"] == {}


def test_every_byte_crosses_between_branches_once(exchanges: list[list[dict[str, Any]]]) -> None:
    graph = _graph(Topology.hub_and_spoke, *BRANCHES)
    rows = {edge: _rows(edge, 8, seed=6) for edge in graph.edges}
    model = sum(
        router_bytes(
            [replace(edge, num_prompts=8, num_generations=1)],
            sequence_tokens=float(np.mean([len(r.token_ids) for r in rows[edge]])),
            response_tokens=float(np.mean([r.response_length for r in rows[edge]])),
            num_states=sum(len(r.ask.positions) for r in rows[edge]),
            vocab_size=VOCAB,
        )
        for edge in graph.edges
    )
    lanes = 2 * (min(2, 1) + min(2, 3))
    overhead = 4 * 8 * ROW_TABLE_BYTES + lanes * 2 * HEADER_BYTES
    assert sum(sum(results[6]["sent"].values()) for results in exchanges) == model + overhead


def _provoke(what: str) -> str:
    world = _join({"text": (0, 1), "image": (2,)}, timeout=6.0)
    graph = _graph(Topology.all_to_all, "text", "image")
    router = Router(world, graph)
    outgoing = {edge: _rows(edge, 4) for edge in graph.into(world.branch)}

    def score(edge: Edge, rows: list[ScoreRequest]) -> list[TeacherScore]:
        scores = _score(world.branch, rows)
        if what == "short scores" and world.branch == "image":
            return [replace(s, logprobs=s.logprobs[:-1]) for s in scores]
        return scores

    if what == "other rows" and world.rank == 1:
        outgoing = {edge: _rows(edge, 4, seed=9) for edge in outgoing}
    if what == "foreign edge" and world.branch == "text":
        outgoing = {edge: [] for edge in graph.edges}
    if what == "out of step" and world.branch == "image":
        router._exchange += 2
    try:
        router.exchange(outgoing, score)
    except (RouterError, CollectiveError) as error:
        time.sleep(1.0)  # let the others meet the same error rather than this one's closed connections
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_rows_or_scores_that_cannot_be_right_are_errors_naming_edge_and_rank() -> None:
    short = launch_distributed(_provoke, 3, args=("short scores",), timeout=40)
    assert "edge text<-image, score function of branch image" in short[2].result
    other = launch_distributed(_provoke, 3, args=("other rows",), timeout=40)
    assert any(
        "edge text<-image lane 0, scores from image rank 0 (global rank 2)" in (o.result or "")
        and "all ranks of branch text must pass the same rows" in o.result
        for o in other
    )
    foreign = launch_distributed(_provoke, 3, args=("foreign edge",), timeout=40)
    assert "branch text has no edges ['image<-text'] as student" in foreign[0].result
    late = launch_distributed(_provoke, 3, args=("out of step",), timeout=40)
    assert any(
        "header field exchange is 3, expected 1" in o.result
        and "from image rank 0 (global rank 2)" in o.result
        for o in late[:2]
    ), "the owner of the lane says who is in another exchange"


def _teacher_in_trouble(trouble: str) -> str:
    world = _join({"text": (0, 1), "image": (2, 3)}, timeout=3.0)
    graph = _graph(Topology.all_to_all, "text", "image")

    def score(edge: Edge, rows: list[ScoreRequest]) -> list[TeacherScore]:
        if world.rank == 3:
            if trouble == "killed":
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return _score(world.branch, rows)

    try:
        Router(world, graph).exchange({edge: _rows(edge, 4) for edge in graph.into(world.branch)}, score)
    except CollectiveError as error:
        time.sleep(1.0)
        return str(error)
    return "no error"


def test_a_teacher_that_hangs_is_named_with_branch_rank_and_edge() -> None:
    outcomes = launch_distributed(_teacher_in_trouble, 4, args=("stuck",), timeout=60)
    assert [o.exit_code for o in outcomes] == [EXIT_STUCK] * 4
    report = next(o.output for o in outcomes if "all ranks:" in o.output)
    assert "image rank 1 (global 3): in opd.exchange 1 > opd.score text<-image for" in report


def test_a_teacher_that_dies_is_named_by_the_student_that_waits() -> None:
    outcomes = launch_distributed(_teacher_in_trouble, 4, args=("killed",), timeout=60)
    assert outcomes[3].exit_code == -signal.SIGKILL
    messages = [o.result for o in outcomes[:3] if o.result and o.result != "no error"]
    assert messages, [o.output for o in outcomes]
    for message in messages:
        assert (
            "image rank 1 (global rank 3, dead or frozen: no heartbeat, last seen in opd.exchange 1 > "
            "opd.score" in message
        )
    assert any("operation 'opd.exchange 1 > opd.receive scores text<-image' failed" in m for m in messages)


def test_custom_one_way_graph_on_a_single_rank_a_branch() -> None:
    for right, swapped in run_distributed(_one_way, 2):
        assert right and not swapped


def _one_way() -> tuple[bool, bool]:
    with _join({"student": (0,), "teacher": (1,)}) as world:
        config = Config(
            branches={"student": BranchConfig(), "teacher": BranchConfig(frozen=True)},
            opd=OPDConfig(topology=Topology.custom, edges=[EdgeConfig(student="student", teacher="teacher")]),
        )
        result = _exchange(world, Router(world, build_graph(config)), lambda edge: 20, seed=1)
    return result["right"], result["swapped"]
