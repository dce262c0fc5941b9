"""Rollouts: vLLM inside the trainer's own processes.

Every rank holds one vLLM worker. ``tensor_parallel_size`` consecutive ranks form an engine. A branch with
more ranks has several engines (rollout replicas), each of which samples its share of the prompts. All ranks
of an engine run the same scheduler on the same requests and therefore return the same samples.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import logging
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.config.checks.branches import CPU_BLOCK_TOKENS
from copd_megatron.config.hardware import check_quantization
from copd_megatron.config.schema import RolloutConfig, RolloutQuantization
from copd_megatron.data.loader import MediaLoader
from copd_megatron.data.seeds import sample_seed
from copd_megatron.records import Prompt, Rollout
from copd_megatron.rollout import in_place, seeded
from copd_megatron.rollout.early_stop import EarlyStop
from copd_megatron.rollout.media import engine_input, engine_settings
from copd_megatron.rollout.packed import pack_rollouts, unpack_rollouts
from copd_megatron.topology.collectives import all_gather_messages
from copd_megatron.topology.watch import is_collective_failure

logger = logging.getLogger(__name__)

_REMEDIES = (
    ("out of memory", "; lower rollout.gpu_memory_utilization, rollout.max_num_seqs or max_new_tokens"),
    (
        "No available memory for the cache blocks",
        "; raise rollout.gpu_memory_utilization (on CPU rollout.cpu_kv_cache_gib)",
    ),
    ("to serve at least one request", "; raise rollout.cpu_kv_cache_gib or gpu_memory_utilization"),
    ("/dev/shm", "; check the free space of /dev/shm (copd doctor)"),
    ("SHMManager", "; check the free space of /dev/shm (copd doctor)"),
    ("EngineDeadError", "; its first error is earlier in this rank's output"),
)
"""Parts of vLLM's error messages, and the remedies."""


def split_replicas(num_items: int, num_replicas: int) -> list[range]:
    """The items of each replica, assigned in turn, so that neighbours of similar difficulty are spread."""
    return [range(replica, num_items, num_replicas) for replica in range(num_replicas)]


class RolloutError(RuntimeError):
    """vLLM failed to start, to load weights, or to sample. Its own exception is the cause."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How to sample a batch. Training and evaluation differ in this."""

    num_generations: int
    temperature: float
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int | None = None
    """Longest response in tokens; None: the branch's ``rollout.max_new_tokens``."""
    stop: tuple[str, ...] | None = None
    """Strings that end a response; None: the branch's ``rollout.stop``."""


class Listener(Protocol):
    """Something that goes on beside the sampling, on its thread."""

    def add(self, rollout: Rollout) -> None:
        """A response has ended."""

    def poll(self) -> None:
        """The engine has made a step."""


@dataclass(kw_only=True)
class _Completion:
    """vLLM's output for one request, received in one piece or in many."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str | None = None
    """Where vLLM decodes it, to look for stop strings."""
    finish_reason: str | None = None
    """None while unfinished."""
    ended_by_token: bool = False
    """The last token ended the response and is no part of its text."""

    def add(self, output: Any, *, decoded: bool) -> None:
        """Appends a piece, or the whole output."""
        self.token_ids += output.token_ids
        if output.logprobs is not None:  # flat: of each position, the sampled token's comes first
            self.logprobs += [output.logprobs.logprobs[i] for i in output.logprobs.start_indices]
        if decoded:
            self.text = (self.text or "") + output.text
        self.finish_reason = output.finish_reason
        self.ended_by_token = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)
        if len(self.logprobs) != len(self.token_ids):
            raise RuntimeError(f"{len(self.logprobs)} log-probabilities of {len(self.token_ids)} tokens")


def _enough(asked: Sequence[str], quota: int, mine: Sequence[tuple[Prompt, int]]) -> Callable[[int], bool]:
    """A function to call with the number of every request that ends. It returns whether ``quota`` prompts
    have all their responses.

    ``asked`` holds the group id of each request's prompt. The other samples of ``mine`` exist already.
    """
    missing = Counter(asked)
    done = [sum(missing[group] == 0 for group in {prompt.group_id for prompt, _ in mine})]

    def ended(number: int) -> bool:
        group = asked[number]
        missing[group] -= 1
        done[0] += missing[group] == 0
        return done[0] >= quota

    return ended


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """A response's text, without special tokens and without a character that is cut off at its end."""
    text: str = tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


class RolloutEngine:
    """The vLLM of one branch. All of its ranks call it together."""

    def __init__(
        self,
        *,
        model_path: str | Path,
        config: RolloutConfig,
        branch: str,
        run_id: str,
        dtype: torch.dtype,
        max_tokens: int,
        seed: int,
        media: MediaLoader | None = None,
        can_sleep: bool = False,
    ) -> None:
        """Starts this rank's worker with dummy weights. Collective over the branch.

        The engine refuses to sample until ``load_weights`` has run.

        Args:
            run_id: becomes part of the names of its shared memory, so that people can recognise it.
            max_tokens: longest prompt plus response.
            seed: of the run.
            media: provides a vision-language model with pixels.
            can_sleep: on a GPU, ``sleep`` releases the engine's device memory.

        Raises:
            ConfigError: this machine cannot sample with the configured quantisation.
            RolloutError: vLLM could not start.
        """
        check_quantization(config.quantization, _capability())
        self.can_sleep = can_sleep and torch.cuda.is_available()
        self.asleep = False
        self.config, self.branch, self.run_seed = config, branch, seed
        self.media = media
        self._num_requests = 0
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.tp_size = config.tensor_parallel_size
        self.replica, self.tp_rank = divmod(self.rank, self.tp_size)
        self.num_replicas = self.world_size // self.tp_size
        self.version: int | None = None
        # a killed run leaves its shared memory behind, so the name must be new even if run_id is not
        nonce = all_gather_messages(uuid.uuid4().hex[:12])[0]
        identity = f"copd-{run_id}-{branch}-{nonce}"
        logger.info("starting vLLM: replicas %d, tensor parallel size %d", self.num_replicas, self.tp_size)
        with self._named("could not start"), _quiet("transformers"):
            self.llm = self._start(str(model_path), dtype, max_tokens, identity)
        dist.barrier()
        _unlink_shared_memory(identity)
        self._tokenizer = self.llm.get_tokenizer()
        if not torch.cuda.is_available():
            self.llm.collective_rpc(seeded.prepare)
        self.loads_in_place = all(self.llm.collective_rpc(in_place.prepare))
        """Whether ``load_weights`` has finished with a tensor when it requests the next one."""

    def _start(self, model_path: str, dtype: torch.dtype, max_tokens: int, identity: str) -> Any:
        on_cuda = torch.cuda.is_available()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if not on_cuda:
            # several ranks share the cores: binding all of them to core 0 would serialise them
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        import vllm

        from copd_megatron.rollout.executor import external_launcher
        from copd_megatron.rollout.norms import compiled_norms

        settings: dict[str, Any] = {
            "gpu_memory_utilization": self.config.gpu_memory_utilization,
            "enable_chunked_prefill": self.config.enable_chunked_prefill,
            "enable_sleep_mode": self.can_sleep,
        }
        if self.config.quantization is not RolloutQuantization.none:
            settings["quantization"] = self.config.quantization.value
        if not on_cuda:
            settings = {
                "kv_cache_memory_bytes": int(self.config.cpu_kv_cache_gib * 2**30),
                # the smallest: short sequences lie closer together, and samples share more of their prompt
                "block_size": CPU_BLOCK_TOKENS,
                "ir_op_priority": compiled_norms(),
                # if vLLM prefills a prompt in pieces, it rewinds the seeded generator by an offset, which CPU
                # generators do not support; so every prompt must fit into one step
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": self.config.max_num_seqs * max_tokens,
            }
        if self.media is not None:
            settings |= engine_settings(self.media.processor)
        return vllm.LLM(
            model=model_path,
            tensor_parallel_size=self.tp_size,
            distributed_executor_backend=external_launcher(identity, on_cuda=on_cuda),
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_tokens,
            max_num_seqs=self.config.max_num_seqs,
            enforce_eager=not on_cuda if self.config.enforce_eager is None else self.config.enforce_eager,
            enable_prefix_caching=self.config.enable_prefix_caching,
            load_format="dummy",
            # log-probabilities of the distribution that is sampled from, including the temperature
            logprobs_mode="processed_logprobs",
            seed=0,
            disable_log_stats=True,
            **settings,
        )

    # ---- device memory ---------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Releases the device memory of weights and KV cache, if the engine can. It then refuses to sample
        until ``load_weights`` has woken it."""
        if self.can_sleep and not self.asleep:
            self.version = None
            self.llm.sleep(level=2)  # keeps nothing, since new weights will be loaded
            self.asleep = True

    def close(self) -> None:
        """Ends the engine and releases its memory, so that the process can start another."""
        from vllm.distributed.parallel_state import destroy_model_parallel

        self.version = None
        # the whole engine's own shutdown would end torch.distributed too, which is the job's
        self.llm.collective_rpc("shutdown")
        del self.llm
        destroy_model_parallel()  # the next engine may have another number of ranks per replica
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ---- weights ---------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Replaces the worker's weights from a stream of (Hugging Face name, full-shape tensor).

        Nothing that was cached under the old weights is kept. If the stream fails midway, the engine has no
        version and refuses to sample.
        """
        self.version = None
        with self._named(f"failed in taking weights of version {version}"):
            if self.asleep:
                self.llm.wake_up(tags=["weights"])
                self.llm.collective_rpc(_clear_deepstack)
            if self.loads_in_place:
                self.llm.collective_rpc(in_place.load, args=(iter(weights),))
            else:
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
                if not torch.cuda.is_available():
                    self.llm.collective_rpc(_repack)
            if self.asleep:  # not earlier, because the stream's buckets need memory as well
                self.llm.wake_up(tags=["kv_cache"])
                self.asleep = False
            self._drop_prefixes()
        self.version = version

    def _drop_prefixes(self) -> None:
        """Makes sure that nothing cached under the old weights is used again. vLLM refuses this while it
        counts a request as running, for example one that was aborted in the middle of a step; then that step
        is finished first."""
        for _ in range(3):
            if self.llm.reset_prefix_cache() is not False:
                return
            self.llm.llm_engine.step()
        raise RuntimeError(
            "vLLM does not drop the prefixes cached under the old weights: requests are running"
        )

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Turns an exception of vLLM into one that names branch, replica and action, with a remedy if
        known."""
        try:
            yield
        except Exception as error:
            if is_collective_failure(error):
                raise  # another rank failed, and the watch reports which
            text = f"{type(error).__name__}: {error}"
            remedy = next((remedy for mark, remedy in _REMEDIES if mark in text), "")
            raise RolloutError(
                f"branch {self.branch}, rollout replica {self.replica} (branch rank {self.rank}): "
                f"vLLM {what}: {text}{remedy}"
            ) from error

    # ---- sampling --------------------------------------------------------------------------------------

    def sample(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, *, step: int, branch: str | None = None
    ) -> list[Rollout]:
        """Samples all prompts, each on one replica, and returns all rollouts on all ranks.

        Args:
            prompts: the same list on every rank of the branch.
            settings: samples per prompt and the distribution.
            step: part of each sample's seed.
            branch: name that is part of the seeds; default: this branch.

        Returns:
            ``len(prompts) * num_generations`` rollouts, ordered by prompt, then sample.

        Raises:
            RuntimeError: the engine has no valid weights.
            RolloutError: vLLM failed.
        """
        return self.gather(self.sample_share(prompts, settings, step=step, branch=branch), prompts, settings)

    def sample_share(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        *,
        step: int,
        branch: str | None = None,
        stop: EarlyStop | None = None,
        listener: Listener | None = None,
    ) -> list[Rollout]:
        """Samples this replica's share of the prompts. All ranks of the engine call it together.

        With ``stop``, sampling ends when this replica's share of the wanted prompts is done, and the
        responses of the other prompts are returned as far as they got. ``listener`` is told of every
        response that ends, in the order in which they end.
        """
        if self.version is None:
            raise RuntimeError(f"branch {self.branch}: vLLM has no valid weights; sync them before sampling")
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        longest = settings.max_new_tokens or self.config.max_new_tokens
        strings = list(self.config.stop if settings.stop is None else settings.stop)
        mine = [
            (prompts[i], sample)
            for i in split_replicas(len(prompts), self.num_replicas)[self.replica]
            for sample in range(settings.num_generations)
        ]
        begun = {} if stop is None else stop.begun
        earlier = [begun.get((prompt.group_id, sample)) for prompt, sample in mine]
        seeds = [
            sample_seed(self.run_seed, branch or self.branch, step, prompt.group_id, sample)
            for prompt, sample in mine
        ]
        # responses that an earlier step finished need no request
        places = [i for i, part in enumerate(earlier) if part is None or part.unfinished]
        inputs, parameters = [], []
        for i in places:
            part = earlier[i]
            inputs.append(mine[i][0] if part is None else replace(mine[i][0], token_ids=part.token_ids))
            parameters.append(
                SamplingParams(
                    n=1,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    top_k=settings.top_k,
                    max_tokens=longest - (0 if part is None else part.response_length),
                    stop=strings or None,
                    seed=seeds[i],
                    logprobs=0,
                    flat_logprobs=True,
                    # decoded once at the end instead of token by token
                    detokenize=bool(strings),
                    output_kind=RequestOutputKind.FINAL_ONLY if stop is None else RequestOutputKind.DELTA,
                )
            )
        enough: Callable[[int], bool] | None = None
        if stop is not None:
            quota = len(split_replicas(stop.num_prompts, self.num_replicas)[self.replica])
            enough = _enough([mine[i][0].group_id for i in places], quota, mine)
        rollouts = {i: part for i, part in enumerate(earlier) if part is not None}

        def take(number: int, completion: _Completion) -> None:
            i = places[number]
            rollouts[i] = self._rollout(*mine[i], seeds[i], completion, earlier[i])

        def ended(number: int, completion: _Completion) -> bool:
            take(number, completion)
            if listener is not None:
                listener.add(rollouts[places[number]])
            return enough is not None and enough(number)

        with self._named(f"failed in sampling {len(places)} responses of step {step + 1}"):
            completions = self._generate(inputs, parameters, ended, listener)
        for number, completion in enumerate(completions):
            if completion.finish_reason is None:
                take(number, completion)
        return [rollouts[i] for i in range(len(mine))]

    def _generate(
        self,
        prompts: Sequence[Prompt],
        parameters: Sequence[Any],
        ended: Callable[[int, _Completion], bool],
        listener: Listener | None,
    ) -> list[_Completion]:
        """Runs the engine until all requests are done, or until ``ended``, which is called for every request
        that ends, returns True. Returns completions in the order of the requests.

        Prompts are passed as tokens and pixels; vLLM's own processor never runs.
        """
        engine = self.llm.llm_engine
        place, seen = {}, set()
        for number, (prompt, sampling) in enumerate(zip(prompts, parameters, strict=True)):
            name = str(self._num_requests)
            self._num_requests += 1
            place[name] = number
            engine.add_request(name, self._engine_input(prompt), sampling)
        completions = [_Completion() for _ in prompts]
        stopped = not prompts
        while engine.has_unfinished_requests() and not stopped:
            for output in engine.step():
                number = place[output.request_id]
                fresh = number not in seen  # pieces of one response repeat its prompt
                seen.add(number)
                if fresh and list(output.prompt_token_ids) != prompts[number].token_ids.tolist():
                    raise RuntimeError(
                        f"{prompts[number].prompt_id}: vLLM and the trainer have different prompt tokens"
                    )
                completions[number].add(output.outputs[0], decoded=parameters[number].detokenize)
                if output.finished:
                    stopped = ended(number, completions[number]) or stopped
            if listener is not None:
                listener.poll()
        if stopped:
            engine.abort_request([n for n, i in place.items() if completions[i].finish_reason is None])
        return completions

    def _engine_input(self, prompt: Prompt) -> Any:
        if self.media is None:
            return {"prompt_token_ids": prompt.token_ids.tolist()}
        assert self.version is not None
        features = self.media.features(prompt.media)
        return engine_input(prompt.token_ids, features, self.media.processor, version=self.version)

    def _rollout(
        self, prompt: Prompt, sample: int, seed: int, completion: _Completion, earlier: Rollout | None
    ) -> Rollout:
        """A completion as a rollout. If it continues an earlier step's response, it is appended to that."""
        begin = prompt.token_ids if earlier is None else earlier.token_ids
        logprobs = np.asarray(completion.logprobs, dtype=np.float32)
        token_ids = np.concatenate([begin, np.asarray(completion.token_ids, np.int32)]).astype(np.int32)
        if completion.text is None:
            response = token_ids[len(prompt.token_ids) :].tolist()
            text = decode(self._tokenizer, response[:-1] if completion.ended_by_token else response)
        else:
            text = ("" if earlier is None else earlier.text) + completion.text
        assert self.version is not None
        return Rollout(
            prompt=prompt,
            sample_index=sample,
            token_ids=token_ids,
            rollout_logprobs=(
                logprobs if earlier is None else np.concatenate([earlier.rollout_logprobs, logprobs])
            ),
            text=text,
            truncated=completion.finish_reason == "length",
            weight_version=self.version if earlier is None else earlier.weight_version,
            seed=seed if earlier is None else earlier.seed,
            unfinished=completion.finish_reason is None,
        )

    def gather(
        self, mine: Sequence[Rollout], prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> list[Rollout]:
        """Brings every replica's rollouts to every rank, in prompt order. Only one rank per engine sends, and
        prompts are not sent, since every rank has them."""
        if self.world_size == 1:
            return list(mine)
        parts = all_gather_messages(pack_rollouts(mine if self.tp_rank == 0 else []))
        rollouts: dict[int, Rollout] = {}
        count = settings.num_generations
        for replica, share in enumerate(split_replicas(len(prompts), self.num_replicas)):
            places = [i * count + sample for i in share for sample in range(count)]
            arrived = unpack_rollouts(parts[replica * self.tp_size], [prompts[i // count] for i in places])
            rollouts.update(zip(places, arrived, strict=True))
        return [rollouts[i] for i in range(len(rollouts))]


@contextlib.contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Hides a library's warnings: on every rank, vLLM passes an argument that transformers has deprecated."""
    messages = logging.getLogger(library)
    level = messages.level
    messages.setLevel(logging.ERROR)
    try:
        yield
    finally:
        messages.setLevel(level)


def _capability() -> tuple[int, int] | None:
    """The compute capability of this rank's GPU; None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _unlink_shared_memory(identity: str) -> None:
    """Removes the names of vLLM's CPU segments, which every rank has mapped by now, so that nothing is left
    behind however the process ends."""
    for file in Path("/dev/shm").glob(f"{glob.escape(identity)}-*cpushm*"):
        file.unlink(missing_ok=True)


def _clear_deepstack(worker: Any) -> None:
    """Zeroes the deepstack buffers of Qwen3-VL. They are neither weights nor registered buffers and lose
    their content when the engine sleeps, but batches without media rely on zeros in them."""
    for buffer in getattr(worker.get_model(), "deepstack_input_embeds", None) or ():
        buffer.zero_()


def _repack(worker: Any) -> None:
    """Repacks what a reload leaves stale. On CPU, vLLM multiplies by packed copies of weights, and a reload
    misses two of them.

    A head that is tied to the embedding is not in the weight stream itself. Experts are packed for the
    grouped product only the first time (``UnquantizedFusedMoEMethod._setup_kernel`` of vLLM 0.30), so after a
    reload the kernel would read plain weights as if they were packed.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.get_model().modules():
        method: Any = getattr(module, "quant_method", None)
        if isinstance(module, ParallelLMHead):
            method.process_weights_after_loading(module)
        elif isinstance(method, UnquantizedFusedMoEMethod):
            method.moe_kernel.fused_experts.process_weights_after_loading(module)
