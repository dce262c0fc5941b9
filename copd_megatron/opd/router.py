"""The executor of the exchange plan: students' rows out, teachers' scores back.

One exchange per OPD step, called by every rank of every branch, sees each branch both as student (of
``graph.into``) and as teacher (of ``graph.out_of``). ``post`` is step 1, ``answer`` the others; what a branch
computes in between hides the way of its rows, and how late the others are. ``exchange`` is both:

1. Each lane's source posts its requests (no waiting) and each end posts the receives of its headers.
2. For each edge in which it teaches, in the graph's order, a branch receives the lanes' rows, shares them
   among its ranks, scores them on all ranks at once, and lane owners post the scores' way back.
3. For each edge in which it learns, a branch receives the scores and shares them among its ranks.

Sends never wait before step 3 is done, and step 2 needs nothing but what step 1 posted, so no order of edges
can deadlock. Between branches every byte crosses once (see ``plan``); inside a branch, lanes are broadcast by
their owners over the default group's Gloo part. Payload buffers and sends stay alive until their wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist

from copd_megatron.config.graph import Edge, Graph
from copd_megatron.opd.plan import Lane, plan_exchange, split_rows
from copd_megatron.opd.records import ScoreRequest, TeacherScore
from copd_megatron.opd.wire import (
    HEADER_BYTES,
    HEADER_FIELDS,
    REQUESTS,
    SCORES,
    Header,
    Message,
    RouterError,
    check_ids,
    check_scores,
    ids_crc,
    media_files,
    pack_requests,
    pack_scores,
    unpack_requests,
    unpack_scores,
)
from copd_megatron.records import MediaRef
from copd_megatron.topology.watch import Operation, Watch
from copd_megatron.topology.world import World

ScoreFunction = Callable[[Edge, list[ScoreRequest]], list[TeacherScore]]
"""Scores an edge's rows in their order. Called on every rank of the teacher branch with the same rows; must
return the same on every rank."""

_KINDS: Final = 2
_PARTS: Final = 2
_PARITIES: Final = 2


@dataclass(kw_only=True)
class EdgeTraffic:
    """What one edge cost this rank in the last exchange."""

    num_rows: int = 0
    sent_bytes: int = 0
    """Over the router, headers included; nothing on ranks that own no lane."""
    received_bytes: int = 0
    wait_seconds: float = 0.0
    """Waiting for the other branch: as a lane's owner for its messages, else for the owners' sharing."""
    score_seconds: float = 0.0
    """In the score function (teacher only)."""


class Router:
    """Carries rows and scores between branches. One per process; collective over the world.

    Args:
        world: the carved-up world.
        graph: the same on every rank.
        watch: names the operations; None: the world's.
        encoded: gives the media files to send with rows, for branches that do not share storage; None: only
            references travel.
        take_file: is given each media file that arrives, before its rows are scored.
        vocab_size: token ids that arrive must lie below it; None: they are not looked at.
    """

    def __init__(
        self,
        world: World,
        graph: Graph,
        watch: Watch | None = None,
        *,
        encoded: Callable[[MediaRef], bytes] | None = None,
        take_file: Callable[[MediaRef, bytes], None] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.world = world
        self.graph = graph
        self.plan = plan_exchange(graph.edges, world.branch_ranks)
        self.traffic: dict[Edge, EdgeTraffic] = {}
        """Per edge of this branch (as student or teacher), of the last exchange."""
        self._watch = watch or world.watch
        self._encoded = encoded
        self._take_file = take_file
        self._vocab_size = vocab_size
        self._index = {edge: i for i, edge in enumerate(graph.edges)}
        self._max_lanes = max((len(lanes) for lanes in self.plan.lanes.values()), default=1)
        self._exchange = 0
        self._asked: dict[Edge, list[ScoreRequest]] = {}
        """What is posted in this exchange."""
        self._lanes_of: dict[Edge, tuple[tuple[int, ...], ...]] = {}
        """Which rows of it go over which lane."""
        self._sends: list[tuple[dist.Work, torch.Tensor]] = []
        self._headers: dict[tuple[Lane, int], tuple[dist.Work, torch.Tensor]] = {}

    def exchange(
        self, outgoing: Mapping[Edge, Sequence[ScoreRequest]], score: ScoreFunction
    ) -> dict[Edge, list[TeacherScore]]:
        """``post(outgoing)``, then ``answer(score)``."""
        self.post(outgoing)
        return self.answer(score)

    def post(self, outgoing: Mapping[Edge, Sequence[ScoreRequest]]) -> None:
        """Sends this branch's rows off; waits for nobody.

        Args:
            outgoing: rows of each edge into this branch, the same on all of its ranks. An edge left out, or
                with no rows, has nothing scored.

        Raises:
            RouterError: an edge that is none of this branch's, or rows that cannot be sent.
        """
        learning, teaching = self.graph.into(self.world.branch), self.graph.out_of(self.world.branch)
        if foreign := [edge.name for edge in outgoing if edge not in learning]:
            raise RouterError(
                f"branch {self.world.branch} has no edges {foreign} as student; its edges: "
                f"{[edge.name for edge in learning]}"
            )
        self._exchange += 1
        self.traffic = {edge: EdgeTraffic() for edge in (*learning, *teaching)}
        self._asked = {edge: list(outgoing.get(edge, ())) for edge in learning}
        with self._watch.operation(f"opd.post {self._exchange}"):
            self._post_headers()
            self._lanes_of = {edge: self._send_requests(edge, self._asked[edge]) for edge in learning}

    def answer(self, score: ScoreFunction) -> dict[Edge, list[TeacherScore]]:
        """Scores the rows that this branch teaches, and waits for the scores of those that it has posted.

        Args:
            score: called for each edge out of this branch that has rows.

        Returns:
            For every edge into this branch, on all of its ranks, the scores in the rows' order.

        Raises:
            RouterError: a row or a score that cannot be right, or ranks that are not in the same exchange.
            CollectiveError: another rank died.
        """
        asked, lanes = self._asked, self._lanes_of
        with self._watch.operation(f"opd.exchange {self._exchange}"):
            for edge in self.graph.out_of(self.world.branch):
                self._teach(edge, score)
            scores = {edge: self._receive_scores(edge, asked[edge], lanes[edge]) for edge in asked}
            with self._watch.operation("opd.wait for sends"):
                for work, _ in self._sends:
                    work.wait()
        self._sends.clear()
        return scores

    # Student.

    def _send_requests(self, edge: Edge, requests: Sequence[ScoreRequest]) -> tuple[tuple[int, ...], ...]:
        """Post this rank's lanes of an edge; which rows go over which lane."""
        self.traffic[edge].num_rows = len(requests)
        lanes = self.plan.lanes[edge]
        rows_of = split_rows([len(request.token_ids) for request in requests], len(lanes))
        for lane, positions in zip(lanes, rows_of, strict=True):
            if lane.source == self.world.rank:
                message = pack_requests(
                    requests,
                    positions,
                    exchange=self._exchange,
                    edge=self._index[edge],
                    lane=lane.index,
                    encoded=self._encoded,
                )
                self._send(lane, message, lane.destination)
        return rows_of

    def _receive_scores(
        self, edge: Edge, requests: Sequence[ScoreRequest], rows_of: tuple[tuple[int, ...], ...]
    ) -> list[TeacherScore]:
        by_position: dict[int, TeacherScore] = {}
        with self._operation("opd.receive scores", edge):
            messages = self._receive(edge, SCORES)
        for lane, message, positions in zip(self.plan.lanes[edge], messages, rows_of, strict=True):
            origin = self._origin("scores", lane, lane.destination)
            # Every rank checks against its own rows, so ranks that hold other rows are found here.
            crc = ids_crc([requests[i] for i in positions])
            if message.header.ids_crc != crc or message.header.edge_rows != len(requests):
                raise RouterError(
                    f"{origin}: scores belong to {message.header.edge_rows} rows with token-id CRC "
                    f"{message.header.ids_crc:#010x}, this rank's lane has {len(requests)} rows in the edge "
                    f"and CRC {crc:#010x}; all ranks of branch {edge.student} must pass the same rows"
                )
            by_position |= unpack_scores(message, origin)
        origin = f"edge {edge.name}, scores from branch {edge.teacher}"
        scores = _in_order(by_position, len(requests), origin)
        check_scores(requests, scores, origin)
        self._check_ids(scores, origin)
        return scores

    # Teacher.

    def _teach(self, edge: Edge, score: ScoreFunction) -> None:
        lanes, traffic = self.plan.lanes[edge], self.traffic[edge]
        with self._operation("opd.receive rows", edge):
            messages = self._receive(edge, REQUESTS)
        by_position: dict[int, ScoreRequest] = {}
        rows_of = []
        for lane, message in zip(lanes, messages, strict=True):
            rows = unpack_requests(message, self._origin("rows", lane, lane.source))
            if self._take_file is not None:
                for ref, data in media_files(message, self._origin("media", lane, lane.source)).items():
                    self._take_file(ref, data)
            rows_of.append(tuple(rows))
            by_position |= rows
        num_rows = messages[0].header.edge_rows
        origin = f"edge {edge.name}, rows from branch {edge.student}"
        requests = _in_order(by_position, num_rows, origin)
        self._check_ids(requests, origin)
        traffic.num_rows = num_rows
        scores: list[TeacherScore] = []
        if requests:
            start = time.perf_counter()
            with self._operation("opd.score", edge):
                scores = score(edge, requests)
            traffic.score_seconds = time.perf_counter() - start
            check_scores(requests, scores, f"edge {edge.name}, score function of branch {edge.teacher}")
        for lane, message, positions in zip(lanes, messages, rows_of, strict=True):
            if lane.destination == self.world.rank:
                answer = pack_scores(
                    scores, positions, exchange=self._exchange, edge=self._index[edge], lane=lane.index,
                    crc=message.header.ids_crc,
                )  # fmt: skip
                self._send(lane, answer, lane.source)

    def _check_ids(self, rows: Sequence[ScoreRequest | TeacherScore], origin: str) -> None:
        if self._vocab_size is not None:
            check_ids(rows, self._vocab_size, origin)

    # Transport.

    def _post_headers(self) -> None:
        """Post the receives of all headers that this rank will get in this exchange."""
        self._headers = {}
        expected = [(lane, REQUESTS, lane.source) for lane in self.plan.receives_of(self.world.rank)]
        expected += [(lane, SCORES, lane.destination) for lane in self.plan.sends_of(self.world.rank)]
        for lane, kind, peer in expected:
            buffer = torch.empty(HEADER_FIELDS, dtype=torch.int64)
            work = self.world.router.recv([buffer], peer, self._tag(lane, kind, 0))
            self._headers[lane, kind] = (work, buffer)

    def _send(self, lane: Lane, message: Message, peer: int) -> None:
        kind = message.header.kind
        parts = [torch.from_numpy(message.header.pack())]
        if message.header.payload_bytes:
            parts.append(torch.from_numpy(message.payload))
        for part, buffer in enumerate(parts):
            work = self.world.router.send([buffer], peer, self._tag(lane, kind, part))
            self._sends.append((work, buffer))
        self.traffic[lane.edge].sent_bytes += HEADER_BYTES + message.header.payload_bytes

    def _receive(self, edge: Edge, kind: int) -> list[Message]:
        """All lanes' messages of one direction of an edge, by lane, on every rank of this branch."""
        start = time.perf_counter()
        lanes = self.plan.lanes[edge]
        owners = [lane.destination if kind == REQUESTS else lane.source for lane in lanes]
        # A plan gives a rank at most one lane end of an edge.
        own = owners.index(self.world.rank) if self.world.rank in owners else None
        headers = torch.empty(len(lanes), HEADER_FIELDS, dtype=torch.int64)
        payload: torch.Tensor | None = None
        if own is not None:
            headers[own], payload = self._receive_own(lanes[own], kind)
        self._share(list(headers), owners)
        messages = []
        for i, lane in enumerate(lanes):
            header = self._header(headers[i], lane, kind)
            mine = payload is not None and i == own
            buffer = payload if mine else torch.empty(header.payload_bytes, dtype=torch.uint8)
            assert buffer is not None
            messages.append((header, buffer))
        self._share([buffer for _, buffer in messages], owners)
        self.traffic[edge].wait_seconds += time.perf_counter() - start
        return [Message(header=header, payload=buffer.numpy()) for header, buffer in messages]

    def _receive_own(self, lane: Lane, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Header and payload of the lane that this rank owns."""
        work, header_buffer = self._headers.pop((lane, kind))
        work.wait()
        header = self._header(header_buffer, lane, kind)
        payload = torch.empty(header.payload_bytes, dtype=torch.uint8)
        if header.payload_bytes:
            peer = lane.source if kind == REQUESTS else lane.destination
            self.world.router.recv([payload], peer, self._tag(lane, kind, 1)).wait()
        self.traffic[lane.edge].received_bytes += HEADER_BYTES + header.payload_bytes
        return header_buffer, payload

    def _share(self, buffers: Sequence[torch.Tensor], owners: Sequence[int]) -> None:
        """Broadcast buffer i from global rank ``owners[i]`` inside this branch; sizes are known
        everywhere."""
        ranks = self.world.branch_ranks[self.world.branch]
        if len(ranks) == 1:
            return
        works = [
            dist.broadcast(buffer, src=ranks.index(owner), async_op=True)
            for buffer, owner in zip(buffers, owners, strict=True)
            if buffer.numel()
        ]
        for work in works:
            assert work is not None
            work.wait()

    def _header(self, values: torch.Tensor, lane: Lane, kind: int) -> Header:
        what, peer = ("rows", lane.source) if kind == REQUESTS else ("scores", lane.destination)
        return Header.unpack(
            values.numpy(), self._origin(what, lane, peer), kind=kind, exchange=self._exchange,
            edge=self._index[lane.edge], lane=lane.index,
        )  # fmt: skip

    def _tag(self, lane: Lane, kind: int, part: int) -> int:
        """Unique among the messages that two ranks can have under way: an exchange overlaps only with the
        next."""
        tag = self._index[lane.edge] * self._max_lanes + lane.index
        return ((tag * _KINDS + kind) * _PARTS + part) * _PARITIES + self._exchange % _PARITIES

    def _operation(self, what: str, edge: Edge) -> Operation:
        ranks = (*self.world.branch_ranks[edge.student], *self.world.branch_ranks[edge.teacher])
        return self._watch.operation(f"{what} {edge.name}", ranks=ranks)

    def _origin(self, what: str, lane: Lane, peer: int) -> str:
        branch, branch_rank = self.world.place_of(peer)
        sender = f"{branch} rank {branch_rank} (global rank {peer})"
        return f"edge {lane.edge.name} lane {lane.index}, {what} from {sender}"


def _in_order[T](by_position: Mapping[int, T], num_rows: int, origin: str) -> list[T]:
    """Rows by their position in the edge, each exactly once."""
    if len(by_position) != num_rows or any(place not in by_position for place in range(num_rows)):
        places = range(min(num_rows, len(by_position) + 8))  # no more than 8 are told
        absent = [place for place in places if place not in by_position][:8]
        raise RouterError(
            f"{origin}: {len(by_position)} distinct rows arrived of {num_rows} announced (missing: "
            f"{absent}); all ranks of the sending branch must pass the same rows"
        )
    return [by_position[i] for i in range(num_rows)]
