#!/usr/bin/env python3
"""Time what branches lose by waiting for each other, and by a slow link between them.

    python tools/bench_waiting.py
    python tools/bench_waiting.py --step-seconds 4 --rows 256 --json
    sudo python tools/bench_waiting.py --link       also over an emulated link (Linux, root)

Two branches of one process each, in real worlds with the real router. What they would compute is slept
instead: sampling (with a spread that is drawn anew in every step), scoring, teaching, update. So the figures
are those of the exchange and of its order, whatever else the machine does. Each run has steps of Phase I in
which nothing crosses, and steps of Phase II with rows both ways.

``together``: the order of work that keeps the branches in step: figures gathered in every step, questions
sent after the branch's own scoring. ``apart``: the trainer's: nobody waits where nothing crosses, questions
sent before. ``lag 1``: the trainer's with ``opd.max_teacher_lag=1``: questions sent a step before they are
learned from. ``waiting`` is the share of a branch's time that it neither computes nor packs; ``link`` is what
the link adds to the time of the run. With branches of unequal speed and equally many steps, the faster one
waits for the difference whatever the order; the slower one's share is what the order is to blame for.
``frozen``: the second branch only teaches, which takes ``--frozen-teaching`` of the student's step.

The link is a pair of tunnel devices in network namespaces, with a process between them that holds every
packet back: it needs neither ``tc netem`` nor anything from the kernel but namespaces and /dev/net/tun.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _numbers import amount, count, count_or_none

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NAMES = ("hub", "spoke")
ORDERS = ("together", "apart", "lag 1")
SPEEDS = {"1 : 1": 1.0, "1 : 2": 0.5, "frozen": 1.0}
"""How long the second branch takes for what the first one does in a second."""
ADDRESSES = ("10.231.77.1", "10.231.77.2")
PARTS = {"native": 0.225, "cross": 0.225, "own": 0.1, "teaching": 0.1, "update": 0.35}
"""Shares of a Phase II step: sampling of both kinds of rows, scoring, teaching, update. Phase I has neither
``own`` nor ``teaching``."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step-seconds", type=amount, default=2.0, help="of computing, of the slower branch")
    parser.add_argument("--spread", type=amount, default=0.2, help="of sampling: 0.2 is 80 to 120 %%")
    parser.add_argument("--steps", type=count, default=6, help="of each phase")
    parser.add_argument("--rows", type=count, default=64, help="per direction and step")
    parser.add_argument("--prompt", type=count_or_none, default=256, help="tokens")
    parser.add_argument("--response", type=count, default=512, help="tokens")
    parser.add_argument("--frozen-teaching", type=amount, default=0.5, help="share of the student's step")
    parser.add_argument("--link", action="store_true", help="also over an emulated link")
    parser.add_argument("--mbit", type=amount, default=100.0, help="of the link, each way")
    parser.add_argument("--round-trip-ms", type=amount, default=50.0, help="of the link")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # one process of a run: its settings as JSON
    return parser.parse_args(arguments)


# ---- one process -----------------------------------------------------------------------------------------


def branch_of(settings: dict[str, Any]) -> dict[str, float]:
    """One branch's run; seconds by phase: in all and not computing."""
    from copd_megatron.config import load_config
    from copd_megatron.config.graph import build_graph
    from copd_megatron.metrics.step_clock import StepClock
    from copd_megatron.opd.router import Router
    from copd_megatron.topology.notes import Notes
    from copd_megatron.topology.world import init_world

    config = load_config(ROOT / "configs/two_branch_tiny.yaml")
    config.branches = dict(zip(NAMES, config.branches.values(), strict=True))
    config.branches[NAMES[1]].frozen = settings["frozen"]
    ranks = {name: [number] for number, name in enumerate(NAMES)}
    found: dict[str, float] = {}
    with init_world(ranks, device="cpu", timeout_seconds=120, run_id="bench") as world:
        router, clock = Router(world, build_graph(config)), StepClock()
        work = Work(settings, world.rank)
        notes = {phase: Notes(world, f"metrics {phase}") for phase in ("rlvr", "opd")}
        world.watch.recorder = clock.operation
        world.barrier("begin")
        for phase in notes:
            work.begin_phase()
            clock.restart()
            for number in range(settings["steps"]):
                if phase == "rlvr":
                    work.sample(number, "native", "cross")
                elif settings["order"] == "lag 1":
                    _ahead(router, work, number, settings["steps"])
                else:
                    _exchange(router, work, number, together=settings["order"] == "together")
                work.do("update")
                gathers = settings["order"] == "together" or (phase, settings["order"]) == ("opd", "apart")
                _hand_over(world, notes[phase], number, gathers=gathers)
            world.barrier("end of the phase")
            seconds, parts = clock.lap()
            found |= {phase: seconds, f"{phase} computing": work.taken()}
            found |= {f"{phase} {part}": parts[part] for part in ("waiting", "exchange")}
    return found


class Work:
    """Sleeps as long as a branch would compute."""

    def __init__(self, settings: dict[str, Any], rank: int) -> None:
        self._rng = random.Random(rank)
        self._step = settings["step_seconds"] * settings["speeds"][rank]
        self._steps, self._spread = settings["steps"], settings["spread"]
        self._parts = dict(PARTS)
        if settings["frozen"]:
            only = {"teaching": settings["frozen_teaching"]} if rank else PARTS | {"teaching": 0.0}
            self._parts = dict.fromkeys(PARTS, 0.0) | only
        self._chances: list[float] = []
        self._seconds = 0.0
        self.rows, self.prompt, self.response = (settings[k] for k in ("rows", "prompt", "response"))

    def begin_phase(self) -> None:
        """Draws how long sampling takes in each of its steps: the same in every order of work."""
        self._chances = [self._rng.uniform(1 - self._spread, 1 + self._spread) for _ in range(self._steps)]

    def sample(self, number: int, *kinds: str) -> None:
        """Samples rows of these kinds for a step."""
        for kind in kinds:
            self.do(kind, self._chances[number])

    def do(self, part: str, chance: float = 1.0) -> None:
        seconds = self._step * self._parts[part] * chance
        time.sleep(seconds)
        self._seconds += seconds

    def taken(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _exchange(router: Any, work: Work, number: int, *, together: bool) -> None:
    """Sampling and the cross rows of a step, one edge each way."""
    work.sample(number, "native", "cross")
    if together:
        work.do("own")
    _post(router, work)
    if not together:
        work.do("own")
    router.answer(_teacher(work))


def _ahead(router: Any, work: Work, number: int, steps: int) -> None:
    """The same with ``opd.max_teacher_lag=1``: the cross rows are those of the next step."""
    if number:
        router.teach(_teacher(work))
    work.sample(number, "native")
    for asked in (number, number + 1) if number == 0 else (number + 1,):
        if asked < steps:
            work.sample(asked, "cross")
            _post(router, work)
            work.do("own")
    if number:
        router.collect()
    else:
        router.answer(_teacher(work))


def _post(router: Any, work: Work) -> None:
    import numpy as np

    from copd_megatron.opd.records import ScoreRequest
    from copd_megatron.records import Ask

    ids = np.zeros(work.prompt + work.response, dtype=np.int32)
    ask = Ask(tokens=True)
    rows = [
        ScoreRequest(row_id=i, token_ids=ids, prompt_length=work.prompt, weight_version=0, ask=ask)
        for i in range(work.rows)
    ]
    router.post(dict.fromkeys(router.graph.into(router.world.branch), rows))


def _teacher(work: Work) -> Any:
    import numpy as np

    from copd_megatron.opd.records import TeacherScore

    def teach(edge: Any, asked: list[Any]) -> list[Any]:
        work.do("teaching")
        said = np.zeros(work.response, dtype=np.float32)
        return [TeacherScore(row_id=r.row_id, weight_version=0, logprobs=said) for r in asked]

    return teach


def _hand_over(world: Any, notes: Any, number: int, *, gathers: bool) -> None:
    """A step's figures: to all at once, or left for those who come later."""
    figures = {f"{world.branch}/figure/{i}": float(i) for i in range(60)}
    if gathers:
        world.all_gather_objects(figures, "metrics.gather")
        world.all_gather_objects((None, False, True), "checkpoint.agree")
        return
    notes.leave(number, figures)
    if number:
        notes.read(number - 1)


# ---- the link --------------------------------------------------------------------------------------------

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MTU = 9000
_QUEUE_SECONDS = 0.4
"""What the link holds at most; more is dropped."""


@contextlib.contextmanager
def link(mbit: float, one_way_seconds: float) -> Iterator[list[str]]:
    """Two network namespaces with a slow link between them; yields their names."""
    spaces = [f"copd-bench-{os.getpid()}-{name}" for name in NAMES]
    forwarder = None
    try:
        for space in spaces:
            _ip("netns", "add", space)
        read, write = os.pipe()
        forwarder = os.fork()
        if forwarder == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it ends with this process
            try:
                _forward(spaces, mbit * 1e6 / 8, one_way_seconds, ready=write)
            finally:
                os._exit(1)
        os.read(read, 1)
        for space, address in zip(spaces, ADDRESSES, strict=True):
            _ip("-n", space, "addr", "add", f"{address}/30", "dev", "bench0")
            _ip("-n", space, "link", "set", "bench0", "mtu", str(_MTU), "up")
            _ip("-n", space, "link", "set", "lo", "up")
        yield spaces
    finally:
        if forwarder:
            os.kill(forwarder, signal.SIGKILL)
            os.waitpid(forwarder, 0)
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _forward(spaces: list[str], bytes_per_second: float, delay: float, *, ready: int) -> None:
    """Carries packets between the namespaces for ever."""
    tunnels = []
    for space in spaces:
        with open(f"/run/netns/{space}") as handle:
            os.setns(handle.fileno(), os.CLONE_NEWNET)
        tunnel = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tunnel, _TUNSETIFF, struct.pack("16sH", b"bench0", _IFF_TUN | _IFF_NO_PI))
        tunnels.append(tunnel)
    os.write(ready, b"1")
    free = [0.0, 0.0]
    under_way: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, _, to, packet = heapq.heappop(under_way)
            with contextlib.suppress(OSError):  # the other end is going away
                os.write(tunnels[to], packet)
        patience = under_way[0][0] - now if under_way else None
        for tunnel in select.select(tunnels, [], [], patience)[0]:
            with contextlib.suppress(OSError):
                packet, start = os.read(tunnel, 65536), tunnels.index(tunnel)
                now = time.monotonic()
                if free[start] - now > _QUEUE_SECONDS:
                    continue
                free[start] = max(free[start], now) + len(packet) / bytes_per_second
                number += 1
                heapq.heappush(under_way, (free[start] + delay, number, 1 - start, packet))


# ---- all runs --------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, *, order: str, speeds: str, spaces: list[str] | None) -> Any:
    """Both branches' figures of one run."""
    names = ("steps", "spread", "rows", "prompt", "response", "step_seconds", "frozen_teaching")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"speeds": [1.0, SPEEDS[speeds]], "order": order, "frozen": speeds == "frozen"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        variables = {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": ADDRESSES[0] if spaces else "127.0.0.1", "MASTER_PORT": str(port),
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        inside = ["ip", "netns", "exec", spaces[rank]] if spaces else []
        command = [*inside, sys.executable, __file__, "--rank", json.dumps(settings)]
        processes.append(
            subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
        )
    found = []
    for process in processes:
        said, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"bench_waiting: a branch ended with {process.returncode}")
        found.append(json.loads(said.splitlines()[-1]))
    return found


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, the orders of work in turn."""
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        places: dict[str, list[str] | None] = {"none": None}
        if options.link:
            places["slow"] = stack.enter_context(link(options.mbit, options.round_trip_ms / 2000))
        for speeds in SPEEDS:
            for where, spaces in places.items():
                for order in ORDERS:
                    found = run(options, order=order, speeds=speeds, spaces=spaces)
                    rows.append({"speeds": speeds, "link": where, "order": order} | _row(found))
    for row in rows:
        for phase in ("rlvr", "opd"):
            near = next(
                r
                for r in rows
                if r["link"] == "none" and (r["speeds"], r["order"]) == (row["speeds"], row["order"])
            )
            row[f"{phase} lost"] = row[f"{phase} seconds"] / near[f"{phase} seconds"] - 1
    return rows


def _row(found: list[dict[str, float]]) -> dict[str, Any]:
    """Seconds of each phase, and the share that each branch did not compute."""
    row: dict[str, Any] = {}
    for phase in ("rlvr", "opd"):
        row[f"{phase} seconds"] = max(branch[phase] for branch in found)
        for name, branch in zip(NAMES, found, strict=True):
            row[f"{phase} waiting {name}"] = 1 - branch[f"{phase} computing"] / branch[phase]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each run. The first branch is the slower one where speeds differ."""
    head = "speeds  link  order     Phase I: s  waiting   lost to link   Phase II: s  waiting   lost to link"
    lines = [head]
    for row in rows:
        cells = [f"{row['speeds']:<8}{row['link']:<6}{row['order']:<10}"]
        for phase in ("rlvr", "opd"):
            waiting = " ".join(f"{100 * row[f'{phase} waiting {name}']:4.1f}" for name in NAMES)
            cells.append(
                f"{row[f'{phase} seconds']:9.1f}  {waiting} % {100 * row[f'{phase} lost']:8.1f} %     "
            )
        lines.append("".join(cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.rank:
        print(json.dumps(branch_of(json.loads(options.rank))))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces go
    rows = measure(options)
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
