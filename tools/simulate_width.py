#!/usr/bin/env python
"""A job's width without its models: launch, agreement, watch, groups, router, manifest and placement.

    python tools/simulate_width.py                  64, 256 and 1024 ranks
    python tools/simulate_width.py --ranks 256 --processes 4

What is real: the store (one process, as rank 0's or torchrun's), a store client and a watch with its two
threads for every rank, the agreement on the configuration, the Gloo group of every branch and of the router,
a barrier, a gathering of metrics and one of a checkpoint's file lists (up to ``--gather`` ranks: in a ring,
every rank waits n times for its neighbour to get a core), and the close. What is not: a rank is a thread, not
a process, many to a process that is forked after the imports, and holds no model, no vLLM and no CUDA; all
are on one machine, so that connections cost no network. ``--eager`` connects every rank with every other at
the start, as small jobs do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import _tree  # noqa: F401 - the code beside this folder
from _numbers import count

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # every client would say that "lo" has no name
import torch
import torch.distributed as dist

from copd_megatron.checkpoint.manifest import BranchEntry, FileEntry, Manifest, read_manifest, write_manifest
from copd_megatron.config.graph import build_graph
from copd_megatron.config.schema import BranchConfig, Config, ModelConfig, ParallelConfig
from copd_megatron.launch.placement import place
from copd_megatron.opd.plan import plan_exchange
from copd_megatron.planner.show import table
from copd_megatron.topology.agreement import agree
from copd_megatron.topology.collectives import all_gather_messages
from copd_megatron.topology.gloo import RouterGroup, gloo_group, is_lazy
from copd_megatron.topology.layout import Layout
from copd_megatron.topology.store import reach_store, serve_store
from copd_megatron.topology.watch import Watch

TIMEOUT_SECONDS = 600.0
FILES_PER_RANK = 3
PHASES = ("connect", "agree", "watch", "branch group", "router", "barrier", "metrics", "file lists", "close")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is simulated."""

    ranks: int
    branches: int
    processes: int
    eager: bool = False
    gathers: bool = True

    def branch_ranks(self) -> dict[str, tuple[int, ...]]:
        """The hub has half of the ranks."""
        spoke = self.ranks // 2 // max(self.branches - 1, 1)
        sizes = [self.ranks - spoke * (self.branches - 1), *[spoke] * (self.branches - 1)]
        found, first = {}, 0
        for number, size in enumerate(sizes):
            found[f"b{number}"] = tuple(range(first, first + size))
            first += size
        return found


def resident_mib(pid: int | str = "self") -> float:
    """Memory of a process that is its own, in MiB: what a fork shares counts once."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    private = [int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_")]
    return sum(private) / 1024


def num_sockets(pid: int | str = "self") -> int:
    """Open sockets of a process."""
    found = 0
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            found += os.readlink(f"/proc/{pid}/fd/{entry}").startswith("socket:")
        except OSError:  # closed meanwhile
            continue
    return found


def num_threads() -> int:
    """Threads of this process, C++'s included."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Threads:"))


def store_main(port: SimpleQueue[int], stop: SimpleQueue[Any], told: SimpleQueue[Any]) -> None:
    """The process that serves the store."""
    before = resident_mib()
    store = serve_store("127.0.0.1", 0, timedelta(seconds=TIMEOUT_SECONDS))
    port.put(store.port)
    stop.get()
    told.put((store.num_keys(), resident_mib() - before, num_sockets()))
    stop.get()


class Rank(threading.Thread):
    """One rank: everything that ``init_world`` makes, the groups as a large job makes them."""

    def __init__(self, job: Job, rank: int, port: int, gate: threading.Barrier) -> None:
        super().__init__(daemon=True)
        self.job, self.rank, self.port, self.gate = job, rank, port, gate
        self.seconds: dict[str, float] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._live()
        except BaseException as error:
            self.error = error

    def _live(self) -> None:
        ranks, timeout = self.job.branch_ranks(), timedelta(seconds=TIMEOUT_SECONDS)
        branch = next(name for name, members in ranks.items() if self.rank in members)
        begin = time.monotonic()
        tcp = reach_store("127.0.0.1", self.port, timeout)
        store = dist.PrefixStore("copd/attempt_0", tcp)
        begin = self._lap("connect", begin)
        agree(store, self.rank, ranks, "width", TIMEOUT_SECONDS)
        begin = self._lap("agree", begin)
        store = dist.PrefixStore("width", store)
        watch = Watch(store, self.rank, ranks, timeout_seconds=TIMEOUT_SECONDS, heartbeat_seconds=2.0)
        begin = self._lap("watch", begin)
        lazy = is_lazy(self.job.ranks) and not self.job.eager
        members = ranks[branch]
        own = gloo_group(
            dist.PrefixStore(f"branch/{branch}", store),
            members.index(self.rank),
            len(members),
            timeout,
            lazy=lazy,
        )
        begin = self._lap("branch group", begin)
        router = gloo_group(dist.PrefixStore("router", store), self.rank, self.job.ranks, timeout, lazy=lazy)
        begin = self._lap("router", begin)
        with watch.operation("barrier"):
            router.barrier().wait()
        begin = self._lap("barrier", begin)
        if self.job.gathers:
            self._gather(router, ranks, branch)
        self.gate.wait()  # sockets and memory are counted here
        self.gate.wait()
        begin = time.monotonic()
        watch.close()
        self._lap("close", begin)
        del own

    def _gather(self, router: RouterGroup, ranks: dict[str, tuple[int, ...]], branch: str) -> None:
        """What the first ranks of branches tell all, after a step and after a checkpoint."""
        members, begin = ranks[branch], time.monotonic()
        first = self.rank == members[0]
        metrics = {f"{branch}/metric/{i}": float(i) for i in range(200)} if first else {}
        assert len(gathered(router, metrics, self.job.ranks)) == self.job.ranks
        begin = self._lap("metrics", begin)
        files = entry_of(len(members)) if first else None
        assert sum(part is not None for part in gathered(router, files, self.job.ranks)) == len(ranks)
        self._lap("file lists", begin)

    def _lap(self, phase: str, begin: float) -> float:
        now = time.monotonic()
        self.seconds[phase] = now - begin
        return now


def gathered(group: RouterGroup, value: Any, ranks: int) -> list[Any]:
    """As ``World.all_gather_objects``."""

    def all_gather(parts: list[torch.Tensor], part: torch.Tensor) -> None:
        group.allgather([parts], [part]).wait()

    def broadcast(tensor: torch.Tensor, source: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        group.broadcast([tensor], options).wait()

    return all_gather_messages(value, num_ranks=ranks, all_gather=all_gather, broadcast=broadcast)


def process_main(job: Job, number: int, port: int, told: SimpleQueue[Any], stop: SimpleQueue[Any]) -> None:
    """One process with its share of the ranks."""
    threading.stack_size(256 * 1024)
    torch.set_num_threads(1)
    before = resident_mib()
    mine = range(number, job.ranks, job.processes)
    gate = threading.Barrier(len(mine) + 1)
    ranks = [Rank(job, rank, port, gate) for rank in mine]
    for rank in ranks:
        rank.start()
    threading.Thread(target=_abort_on_error, args=(ranks, gate), daemon=True).start()
    try:
        gate.wait()
        told.put((resident_mib() - before, num_sockets(), num_threads(), None))
        stop.get()
        gate.wait()
        for rank in ranks:
            rank.join()
        told.put(([rank.seconds for rank in ranks],))
    except threading.BrokenBarrierError:
        told.put((0.0, 0, 0, next(f"{r.rank}: {r.error!r}" for r in ranks if r.error is not None)))
    stop.get()
    os._exit(0)


def _abort_on_error(ranks: list[Rank], gate: threading.Barrier) -> None:
    while any(rank.is_alive() for rank in ranks):
        if any(rank.error is not None for rank in ranks):
            gate.abort()
            return
        time.sleep(0.2)


def simulate(job: Job) -> dict[str, Any]:
    """Runs one job and returns its figures."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context = multiprocessing.get_context("fork")
    port, stop_store, of_store = context.SimpleQueue(), context.SimpleQueue(), context.SimpleQueue()
    server = context.Process(target=store_main, args=(port, stop_store, of_store), daemon=True)
    server.start()
    told, stop = context.SimpleQueue(), context.SimpleQueue()
    number = port.get()
    begin = time.monotonic()
    workers = [
        context.Process(target=process_main, args=(job, n, number, told, stop), daemon=True)
        for n in range(job.processes)
    ]
    for worker in workers:
        worker.start()
    up = [told.get() for _ in workers]
    started = time.monotonic() - begin
    failed = [entry[3] for entry in up if entry[3] is not None]
    if failed:
        raise RuntimeError(f"a rank failed: {failed[0]}")
    stop_store.put(None)
    keys, memory, sockets = of_store.get()
    for _ in workers:
        stop.put(None)
    laps = [seconds for _ in workers for seconds in told.get()[0]]
    for _ in workers:
        stop.put(None)
    for worker in workers:
        worker.join()
    stop_store.put(None)
    server.join()
    return {
        "ranks": job.ranks,
        "seconds": started,
        "phases": {phase: max(lap.get(phase, 0.0) for lap in laps) for phase in PHASES},
        "keys": keys,
        "store_mib": memory,
        "store_sockets": sockets,
        "rank_sockets": sum(entry[1] for entry in up) / job.ranks,
        "rank_threads": sum(entry[2] for entry in up) / job.ranks,
        "rank_mib": sum(entry[0] for entry in up) / job.ranks,
        **without_processes(job),
    }


# ---- what needs no processes -----------------------------------------------------------------------------


def entry_of(ranks: int) -> BranchEntry:
    """A branch's entry of a manifest, with the files of its ranks."""
    names = [f"b0/__{rank}_{file}.distcp" for rank in range(ranks) for file in range(FILES_PER_RANK)]
    files = tuple(FileEntry(path=name, num_bytes=2**30, sha256="0" * 64) for name in names)
    sizes = {"tp": 4, "pp": 2, "cp": 1, "ep": 8, "dp": ranks // 8}
    return BranchEntry(weight_version=1, layout=sizes, frozen=False, model_path="m", dims={}, files=files)


def without_processes(job: Job) -> dict[str, Any]:
    """Seconds and bytes of a manifest, a placement and an exchange plan of a job's size."""
    ranks = job.branch_ranks()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        entries = {branch: entry_of(len(members)) for branch, members in ranks.items()}
        manifest = Manifest(step=1, branches=entries, config="", saved_at="")
        begin = time.thread_time()
        write_manifest(Path(name), manifest)
        found["manifest_kb"] = (Path(name) / "manifest.json").stat().st_size / 1e3
        read_manifest(Path(name))
        found["manifest_seconds"] = time.thread_time() - begin
    branches = {
        branch: BranchConfig(parallel=ParallelConfig(data_parallel_size=len(members)))
        for branch, members in ranks.items()
    }
    config = Config(model=ModelConfig(path="m"), branches=branches)
    begin = time.thread_time()
    place(Layout.from_config(config), num_nodes=None, ranks_per_node=8)
    found["placement_seconds"] = time.thread_time() - begin
    begin = time.thread_time()
    plan = plan_exchange(build_graph(config).edges, ranks)
    found["plan_seconds"] = time.thread_time() - begin
    found["lanes"] = sum(map(len, plan.lanes.values()))
    return found


ROWS: tuple[tuple[str, str, Any], ...] = (
    ("start-up, s (busy machine)", "", lambda f: f"{f['seconds']:.1f}"),
    *(
        (f"  {phase}, s", "", lambda f, phase=phase: f"{f['phases'][phase]:.2f}")
        for phase in PHASES
    ),
    ("store keys", "5 n + 1", lambda f: str(f["keys"])),
    ("  a rank", "constant", lambda f: f"{f['keys'] / f['ranks']:.2f}"),
    ("store: own memory, MiB", "a n + b", lambda f: f"{f['store_mib']:.1f}"),
    ("store: sockets", "3 n + 3", lambda f: str(f["store_sockets"])),
    ("sockets a rank", "4 + 2 log2 n, lazy", lambda f: f"{f['rank_sockets']:.1f}"),
    ("threads a rank", "constant", lambda f: f"{f['rank_threads']:.1f}"),
    ("memory a rank, MiB", "constant", lambda f: f"{f['rank_mib']:.2f}"),
    ("manifest, kB", "b + 0.5 n", lambda f: f"{f['manifest_kb']:.0f}"),
    ("manifest written and read, s", "a n", lambda f: f"{f['manifest_seconds']:.3f}"),
    ("placement, s", "a n", lambda f: f"{f['placement_seconds']:.4f}"),
    ("exchange plan, s", "a n", lambda f: f"{f['plan_seconds']:.4f}"),
    ("lanes of 4 edges", "4 min(32, n / 4)", lambda f: str(f["lanes"])),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=count, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--branches", type=count, default=3)
    parser.add_argument("--processes", type=count, default=16)
    parser.add_argument("--gather", type=count, default=256, help="most ranks that gather messages")
    parser.add_argument("--eager", action="store_true", help="full meshes, whatever the size")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for ranks in arguments.ranks:
        job = Job(
            ranks=ranks,
            branches=arguments.branches,
            processes=min(arguments.processes, ranks),
            eager=arguments.eager,
            gathers=ranks <= arguments.gather,
        )
        results.append(simulate(job))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    cells = [["ranks", "formula", *(str(found["ranks"]) for found in results)]]
    cells += [[title, formula, *(value(found) for found in results)] for title, formula, value in ROWS]
    print("\n".join(table(cells)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
