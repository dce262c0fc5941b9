"""Branch worlds, router group and watch, on real Gloo ranks."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import unittest.mock
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from copd_megatron.errors import EXIT_HOPELESS, ConfigError
from copd_megatron.topology.messages import MessageError
from copd_megatron.topology.watch import EXIT_STUCK, CollectiveError, Watch, is_collective_failure
from copd_megatron.topology.who_waits import RankState, format_report, waited_for
from copd_megatron.topology.world import World, WorldError, _connect, init_world
from tests.support.distributed import DistributedTestError, launch_distributed, run_distributed

BRANCHES = {"text": (0, 1), "image": (2,), "video": (3, 4, 5)}


def _world(branches: dict[str, tuple[int, ...]] = BRANCHES, timeout: float = 60.0, **kwargs: Any) -> World:
    return init_world(branches, device="cpu", timeout_seconds=timeout, run_id="test", **kwargs)


def _check_worlds() -> dict[str, Any]:
    before = dict(os.environ)
    with _world() as world:
        branch_sum = torch.tensor([float(world.rank)])
        dist.all_reduce(branch_sum)
        everyone = world.all_gather_objects({"rank": world.rank, "padding": "x" * (1 + 1000 * world.rank)})
        # one long message among short ones is sent by itself
        alone = world.all_gather_objects("x" * 20_000 if world.rank == 2 else world.rank)
        mates = world.branch_gather((world.branch, world.branch_rank))
        world.adopt_branch_environment()
        inside = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        ring = torch.empty(1)
        peer = (world.rank + 1) % world.world_size
        works = [
            world.router.recv([ring], (world.rank - 1) % world.world_size, 5),
            world.router.send([torch.tensor([float(world.rank)])], peer, 5),
        ]
        for work in works:
            work.wait()
        result = {
            "branch": world.branch,
            "branch_rank": world.branch_rank,
            "default": (dist.get_rank(), dist.get_world_size()),
            "sum": branch_sum.item(),
            "everyone": [(o["rank"], len(o["padding"])) for o in everyone],
            "alone": [len(one) if isinstance(one, str) else one for one in alone],
            "mates": mates,
            "inside": inside,
            "ring": ring.item(),
            "place": world.place_of(4),
            "sockets": sum(1 for fd in os.listdir("/proc/self/fd") if _is_socket(fd)),
        }
    result["restored"] = dict(os.environ) == before
    result["initialized"] = dist.is_initialized()
    world.close()
    return result


def _is_socket(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "agent_store", [True, False], ids=["agent hosts the store", "rank 0 hosts the store"]
)
def test_branches_are_worlds_of_their_own_beside_a_router(agent_store: bool) -> None:
    results = run_distributed(_check_worlds, 6, agent_store=agent_store)
    for branch, ranks in BRANCHES.items():
        for branch_rank, rank in enumerate(ranks):
            got = results[rank]
            assert (got["branch"], got["branch_rank"]) == (branch, branch_rank)
            assert got["default"] == (branch_rank, len(ranks))
            assert got["sum"] == sum(ranks), "the default group must span this branch only"
            assert got["everyone"] == [(r, 1 + 1000 * r) for r in range(6)]
            assert got["alone"] == [0, 1, 20_000, 3, 4, 5]
            assert got["mates"] == [(branch, i) for i in range(len(ranks))]
            assert got["inside"] == {
                "RANK": str(branch_rank), "WORLD_SIZE": str(len(ranks)), "LOCAL_RANK": str(rank),
            }  # fmt: skip
            assert got["ring"] == (rank - 1) % 6
            assert got["place"] == ("video", 1)
            assert got["restored"] and not got["initialized"]


def _check_lazy_router() -> tuple[float, int, int]:
    from copd_megatron.topology import gloo as module

    module.LAZY_FROM = 1
    return _ring_and_sockets()


def _check_eager_router() -> tuple[float, int, int]:
    return _ring_and_sockets()


def _ring_and_sockets() -> tuple[float, int, int]:
    with _world() as world:
        sockets = sum(1 for fd in os.listdir("/proc/self/fd") if _is_socket(fd))
        value = torch.empty(1)
        far = (world.rank + 3) % 6
        works = [
            world.router.recv([value], far, 1),
            world.router.send([torch.tensor([1.0 * world.rank])], far, 1),
        ]
        for work in works:
            work.wait()
        return value.item(), far, sockets


def test_large_worlds_connect_on_first_use() -> None:
    lazy = run_distributed(_check_lazy_router, 6)
    eager = run_distributed(_check_eager_router, 6)
    for value, far, _ in lazy + eager:
        assert value == far
    assert sum(s for *_, s in lazy) < sum(s for *_, s in eager), "a lazy router must hold fewer connections"


def _join(branches: dict[str, tuple[int, ...]]) -> str:
    try:
        init_world(branches, device="cpu", timeout_seconds=20, run_id=f"run-{os.environ['RANK']}")
    except (ValueError, WorldError) as error:
        return f"{type(error).__name__}: {error}"
    return "joined"


def test_a_world_that_does_not_fit_the_branches_is_refused_with_the_arithmetic() -> None:
    results = run_distributed(_join, 2, args=({"text": (0,), "image": (1, 2)},))
    for message in results:
        assert message.startswith("ValueError")
        assert "1 (text) + 2 (image) = 3 ranks, the job has 2" in message
        assert "launch 3 processes" in message


def _join_or_stay_away() -> str:
    if os.environ["RANK"] == "2":
        return "stayed away"
    try:
        init_world({"text": (0, 1), "image": (2,)}, device="cpu", timeout_seconds=2, run_id="a")
    except WorldError as error:
        return str(error)
    return "joined"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("address", ["no-such-host.invalid", "taken port"])
def test_a_store_that_cannot_be_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, address: str, rank: int
) -> None:
    """Whether this rank would serve it, or only reach it. What listens at the port answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1" if address == "taken port" else address)
        monkeypatch.setenv("MASTER_PORT", str(port))
        role = "reach" if rank else "serve"
        with pytest.raises(WorldError, match=rf"rank {rank} cannot {role} the job's store at .*:{port}: "):
            _connect(rank, timedelta(seconds=2))


def test_ranks_that_never_start_are_named() -> None:
    results = run_distributed(_join_or_stay_away, 3)
    for message in results[:2]:
        assert "1 of 3 ranks did not start within 2 s: image rank 0 (global rank 2)" in message


def test_ranks_with_another_configuration_are_refused_by_all() -> None:
    for message in run_distributed(_join, 2, args=({"text": (0,), "image": (1,)},)):
        assert message.startswith("WorldError: image rank 0 (global rank 1) was started with")
        assert "run-1" in message and "run-0" in message


def test_no_launcher_environment_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(WorldError, match=r"RANK.* not set: start the job with torchrun"):
        init_world({"text": (0,)}, device="cpu", timeout_seconds=1, run_id="a")


TORCHRUN_SCRIPT = """
import os, sys
from datetime import timedelta
from pathlib import Path
from copd_megatron.topology.world import init_world
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
with init_world({"text": (0,), "image": (1,)}, device="cpu", timeout_seconds=30, run_id="r") as world:
    world.store.set(f"stale/{world.rank}", attempt)
    world.barrier("stale keys")
    other = world.store.get(f"stale/{1 - world.rank}").decode()
    assert other == attempt, (other, attempt)
    Path(sys.argv[1], f"{world.branch}-{attempt}").write_text(str(world.world_size))
    if attempt == "0":
        raise SystemExit(3)
"""


def test_torchrun_restart_reads_no_stale_keys(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(TORCHRUN_SCRIPT)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1",
        "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(script), str(tmp_path),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {p.name for p in tmp_path.glob("*-*")} == {"text-0", "image-0", "text-1", "image-1"}


# The watch.


def _state(rank: int, branch: str, branch_rank: int, path: str, seconds: float, **kwargs: Any) -> RankState:
    values: dict[str, Any] = {"status": "running", "count": 10, **kwargs}
    return RankState(rank=rank, branch=branch, branch_rank=branch_rank, path=path, seconds=seconds, **values)


def test_report_names_who_is_waited_for_and_who_is_behind() -> None:
    mine = _state(0, "text", 0, "opd.score image<-text", 600)
    table = [
        mine,
        _state(1, "text", 1, "opd.score image<-text", 590, count=9),
        _state(2, "image", 0, "opd.score image<-text", 600, count=77),
        _state(3, "image", 1, "rollout.generate", 613, count=70),
        _state(4, "video", 0, "policy.update", 5, status="dead"),
    ]
    assert [s.rank for s in waited_for(mine, table)] == [4, 3, 1]
    assert [s.rank for s in waited_for(mine, table, ranks=(0, 2, 3))] == [3]
    report = format_report(mine, table)
    assert "video rank 0 (global rank 4, dead or frozen: no heartbeat, last seen in policy.update)" in report
    assert "image rank 1 (global rank 3, in rollout.generate for 613 s)" in report
    assert "behind in branch text: rank 1 at operation 9 (this rank: 10)" in report
    assert "text ranks 0-1 (global 0-1): in opd.score image<-text for 600 s" in report
    together = format_report(mine, [mine, table[2]])
    assert "waiting for: nobody; every rank taking part is in the same operation" in together
    alone = format_report(mine, table, ranks=(0,))
    assert "waiting for: nobody; no other rank takes part in this" in alone


def test_only_backend_failures_become_collective_errors() -> None:
    assert is_collective_failure(
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed")
    )
    assert is_collective_failure(dist.DistBackendError("NCCL error"))
    assert not is_collective_failure(RuntimeError("The size of tensor a (3) must match"))
    assert not is_collective_failure(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_collective_failure(ValueError("gloo"))


def _alone(timeout: float = 30.0, **kwargs: Any) -> Watch:
    return Watch(dist.HashStore(), 0, {"text": (0,)}, timeout_seconds=timeout, **kwargs)


def test_operations_nest_and_survive_exceptions_that_are_caught() -> None:
    watch = _alone(heartbeat_seconds=0.05)
    with watch.operation("outer"):
        with pytest.raises(ValueError, match="mine"), watch.operation("inner"):
            assert watch.table()[0].path == "outer > inner"
            raise ValueError("mine")
        failed = watch.table()[0]
        assert (failed.status, failed.path) == ("failed", "outer > inner")
        with watch.operation("second"):
            assert watch.table()[0].path == "outer > second"
    last = watch.table()[0]
    assert (last.status, last.path, last.count) == ("running", "", 3)
    watch.close()
    watch.close()
    assert watch.table()[0].status == "closed"


def test_progress_within_an_operation_keeps_it_alive() -> None:
    watch = _alone(timeout=0.5, heartbeat_seconds=0.05)
    with watch.operation("step"):
        for i in range(6):
            time.sleep(0.2)
            with watch.operation(f"part {i}"):
                pass
    with watch.operation("slow by design", timeout_seconds=10):
        time.sleep(0.8)
    time.sleep(0.8)
    watch.close()


def _operation_cost() -> float:
    with _world({"text": (0, 1)}) as world:
        n = 2000
        start = time.perf_counter()
        for _ in range(n):
            with world.watch.operation("opd.score image<-text"):
                pass
        return (time.perf_counter() - start) / n


def test_an_operation_costs_less_than_a_third_of_a_millisecond() -> None:
    assert max(run_distributed(_operation_cost, 2)) < 300e-6


def _stuck(report_dir: str | None) -> None:
    logging.basicConfig(level=logging.INFO)
    with _world(
        {"text": (0, 1), "image": (2, 3)}, 2.0, report_dir=Path(report_dir) if report_dir else None
    ) as world:
        if world.rank == 3:
            with world.watch.operation("rollout.generate", timeout_seconds=1000):
                _sleep_forever_in_a_function_with_a_name()
        with world.watch.operation("opd.score image<-text"):
            world.router.barrier().wait()


def _sleep_forever_in_a_function_with_a_name() -> None:
    time.sleep(1000)


@pytest.mark.parametrize("with_dir", [False, True])
@pytest.mark.parametrize("agent_store", [True, False])
def test_a_stuck_rank_is_named_and_the_job_ends(tmp_path: Path, with_dir: bool, agent_store: bool) -> None:
    folder = str(tmp_path / "watch") if with_dir else None
    outcomes = launch_distributed(_stuck, 4, args=(folder,), timeout=60, agent_store=agent_store)
    assert [o.exit_code for o in outcomes] == [EXIT_STUCK] * 4, [o.output for o in outcomes]
    reports = [o.output for o in outcomes if "waiting for:" in o.output]
    assert len(reports) == 1, "one rank reports, the others follow"
    report = reports[0]
    assert "in operation 'opd.score image<-text' without progress for 2 s (limit 2 s)" in report
    assert "waiting for: image rank 1 (global rank 3, in rollout.generate for" in report
    assert "text ranks 0-1 (global 0-1): in opd.score image<-text" in report
    if with_dir:
        stuck = (tmp_path / "watch" / "stuck_rank_00003.txt").read_text()
        assert "_sleep_forever_in_a_function_with_a_name" in stuck
        assert len(list((tmp_path / "watch").iterdir())) == 4
    else:
        assert "_sleep_forever_in_a_function_with_a_name" in outcomes[3].output
    assert max(o.seconds for o in outcomes) < 30


def _frozen_store_host() -> None:
    world = _world({"text": (0, 1), "image": (2,)}, 3.0)
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    with world.watch.operation("opd.score image<-text"):
        world.router.barrier().wait()


def test_a_frozen_host_of_the_store_is_named_and_the_others_end() -> None:
    """Rank 0 serves the store below srun: stopped, it can neither report nor answer."""
    outcomes = launch_distributed(_frozen_store_host, 3, agent_store=False, stop_on_failure=True)
    for outcome in outcomes[1:]:
        assert outcome.exit_code == EXIT_STUCK, outcome.output
        assert "in operation 'opd.score image<-text' without progress for 3 s (limit 3 s)" in outcome.output
        assert "waiting for: text rank 0 (global rank 0), frozen: it serves the job's store" in outcome.output
        assert outcome.seconds < 30


def _hopeless() -> None:
    logging.basicConfig(level=logging.INFO)
    with _world({"text": (0, 1), "image": (2,)}, 60.0) as world:
        if world.rank == int(os.environ["FAILS"]):
            raise ConfigError("run.seed: no good")
        with world.watch.operation("rollout.generate"):
            time.sleep(50)  # as NCCL does, without a word of the rank that is gone


@pytest.mark.parametrize("agent_store", [True, False])
@pytest.mark.parametrize("fails", [0, 1])
def test_what_no_restart_can_mend_ends_every_rank_with_that_status(fails: int, agent_store: bool) -> None:
    """srun reports the highest status of all ranks; it must not be that of a rank killed meanwhile."""
    outcomes = launch_distributed(
        _hopeless, 3, env={"FAILS": str(fails)}, timeout=40, agent_store=agent_store
    )
    for outcome in outcomes:
        if outcome.rank == fails:
            assert "ConfigError: run.seed: no good" in str(outcome.error)
            continue
        assert outcome.exit_code == EXIT_HOPELESS, outcome.output
        assert (
            f"watch: the job ends: text rank {fails} (global rank {fails}): ConfigError: run.seed: no good; "
            "starting it again as it is cannot help" in outcome.output
        )
        assert "stacks" not in outcome.output


def _sends_a_pickle() -> tuple[bool, str]:
    """Rank 1 answers with a pickle instead of a message, in the branch's group and in the router's."""
    hostile = pickle.dumps(_Explodes())
    said = []
    with _world({"text": (0, 1)}) as world:
        for gather in (world.branch_gather, world.all_gather_objects):
            if world.rank == 1:
                with unittest.mock.patch("copd_megatron.topology.collectives.encode", lambda _: hostile):
                    said.append(_refused(gather))
            else:
                said.append(_refused(gather))
        world.barrier("both")
    return os.path.exists(os.environ["RAN"]), "; ".join(said)


class _Explodes:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ['RAN']}",)


def _refused(gather: Any) -> str:
    try:
        return f"accepted {gather({'a': 1})}"
    except MessageError as error:
        return str(error)


def test_a_pickle_in_our_channels_is_refused_and_not_run(tmp_path: Path) -> None:
    for ran, said in run_distributed(_sends_a_pickle, 2, env={"RAN": str(tmp_path / "ran")}):
        assert not ran and "accepted" not in said, said


def _announces_too_much() -> str:
    with _world({"text": (0, 1)}) as world:
        if world.rank == 1:
            size = torch.tensor([2**50])
            dist.all_gather([torch.empty_like(size) for _ in range(2)], size)
            return ""
        return _refused(world.branch_gather)


def test_a_size_that_no_message_has_is_refused_before_memory_is_taken() -> None:
    said = run_distributed(_announces_too_much, 2)[0]
    assert "group rank 1 announces a message of 1125899906842624 bytes" in said


def _interface() -> tuple[str | None, str | None, str | None]:
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    with _world({"text": (0,), "image": (1,)}):
        inside = os.environ.get("GLOO_SOCKET_IFNAME")
    return before, inside, os.environ.get("GLOO_SOCKET_IFNAME")


def test_gloo_uses_the_interface_that_leads_to_the_store() -> None:
    for before, inside, after in run_distributed(_interface, 2, env={"GLOO_SOCKET_IFNAME": ""}):
        assert (before, inside, after) == ("", "lo", "")


def _killed() -> dict[str, Any] | None:
    world = _world({"text": (0, 1), "image": (2, 3)}, 12.0)
    if world.rank == 3:
        with world.watch.operation("rollout.generate"):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        with world.watch.operation("step 7"), world.watch.operation("opd.score image<-text"):
            world.router.barrier().wait()
    except CollectiveError as error:
        time.sleep(1.0)  # the store's host must not be the first to leave
        return {
            "message": str(error), "branch": error.branch, "rank": error.rank, "operation": error.operation,
            "seconds": error.seconds, "cause": type(error.__cause__).__name__,
        }  # fmt: skip
    return None


@pytest.mark.parametrize("agent_store", [True, False])
def test_a_killed_rank_is_named_by_those_that_waited_for_it(agent_store: bool) -> None:
    outcomes = launch_distributed(_killed, 4, timeout=60, agent_store=agent_store)
    assert outcomes[3].exit_code == -signal.SIGKILL
    for rank, branch in ((0, "text"), (1, "text"), (2, "image")):
        result = outcomes[rank].result
        assert result is not None, outcomes[rank].output
        assert (result["branch"], result["rank"], result["operation"]) == (
            branch,
            rank,
            "opd.score image<-text",
        )
        assert result["cause"] == "RuntimeError"
        assert "'step 7 > opd.score image<-text' failed after" in result["message"]
        assert (
            "waiting for: image rank 1 (global rank 3, dead or frozen: no heartbeat, last seen in "
            "rollout.generate)" in result["message"]
        )


# The harness itself.


def _returns(value: int) -> tuple[int, int, str]:
    return value, int(os.environ["RANK"]), os.environ["OMP_NUM_THREADS"] + os.environ.get("EXTRA", "")


def _raises_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise KeyError("a cause of its own")
    time.sleep(60)


def _hangs() -> None:
    time.sleep(60)


def test_harness_returns_results_and_raises_the_failing_ranks_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run_distributed(_returns, 2, args=(7,), env={"EXTRA": "!"}) == [(7, 0, "1!"), (7, 1, "1!")]
    monkeypatch.setattr("tests.support.ranks.GRACE_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(
        DistributedTestError, match=r"(?s)rank 1: exit code 1 .*KeyError: 'a cause of its own'"
    ):
        run_distributed(_raises_on_one, 2)
    with pytest.raises(DistributedTestError, match="2 of 2 ranks failed"):
        run_distributed(_hangs, 2, timeout=1)
    assert time.monotonic() - start < 20


_ENDS_JUST_AFTER = """
import sys, time
from datetime import timedelta
from copd_megatron.topology.store import serve_store
from copd_megatron.topology.watch import Watch

store = serve_store("127.0.0.1", 0, timedelta(seconds=30))
watch = Watch(store, 0, {"a": [0]}, timeout_seconds=1.0, heartbeat_seconds=0.4)
for number in range(3):
    with watch.operation(f"slow {number}"):
        time.sleep(float(sys.argv[1]))
    time.sleep(1.2)  # the work that goes on
print("went on", flush=True)
watch.close()
"""


@pytest.mark.parametrize(("seconds", "status"), [(1.8, 0), (6.0, EXIT_STUCK)])
def test_an_operation_that_ends_just_after_its_limit_kills_nobody(seconds: float, status: int) -> None:
    """The watch looks again when it has found out who waits for whom; one that is stuck still ends the
    job."""
    done = subprocess.run(
        [sys.executable, "-c", _ENDS_JUST_AFTER, str(seconds)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert ("went on" in done.stdout) == (status == 0)
    assert ("operation 'slow 0' without progress" in done.stderr) == (status != 0)
