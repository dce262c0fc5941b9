"""The executor of the exchange plan: students' rows out, teachers' scores back.

One exchange per OPD step, called by every rank of every branch, sees each branch both as student (of
``graph.into``) and as teacher (of ``graph.out_of``). It has three parts:

1. ``post``: each lane's source posts its requests (no waiting) and each end posts the receives of its
   headers.
2. ``teach``: for each edge in which it teaches, in the graph's order, a branch receives the lanes' rows,
   shares them among its ranks, scores them on all ranks at once, and lane owners post the scores' way back.
3. ``collect``: for each edge in which it learns, a branch receives the scores and shares them among its
   ranks.

``answer`` is parts 2 and 3, ``exchange`` all three. What a branch computes between the parts hides the way of
its rows, and how late the others are. Exchanges end in the order in which they were posted, and the next one
may be posted before one has ended: its rows wait until their teacher comes to them.

Sends never wait before part 3 is done, and part 2 needs nothing but what part 1 posted, so no order of edges
can deadlock. Between branches every byte crosses once (see ``plan``); inside a branch, lanes are broadcast by
their owners over the default group's Gloo part. Payload buffers and sends stay alive until their wait.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(kw_only=True)
class _Exchange:
    """An exchange that has been posted and has not ended."""

    number: int
    asked: dict[Edge, list[ScoreRequest]]
    """The rows of each edge into this branch."""
    traffic: dict[Edge, EdgeTraffic]
    lanes_of: dict[Edge, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Which of these rows go over which lane."""
    headers: dict[tuple[Lane, int], tuple[dist.Work, torch.Tensor]] = field(default_factory=dict)
    taught: bool = False


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """A send whose wait is still to come."""

    exchange: int
    kind: int
    work: dist.Work
    buffer: torch.Tensor


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
        """The number of the exchange that was posted last."""
        self._open: deque[_Exchange] = deque()
        """Those that have not ended, in their order."""
        self._sends: list[_Sent] = []

    @property
    def is_open(self) -> bool:
        """Whether an exchange has been posted and has not ended."""
        return bool(self._open)

    @property
    def is_taught(self) -> bool:
        """Whether this branch has scored the rows of the oldest open exchange."""
        return bool(self._open) and self._open[0].taught

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
            RouterError: an edge that is none of this branch's, rows that cannot be sent, or two exchanges
                that are open already.
        """
        if len(self._open) == _PARITIES:
            raise RouterError(
                f"branch {self.world.branch} posts a third exchange while {self._open[0].number} and "
                f"{self._open[1].number} are open; collect the answers of the first before"
            )
        learning, teaching = self.graph.into(self.world.branch), self.graph.out_of(self.world.branch)
        if foreign := [edge.name for edge in outgoing if edge not in learning]:
            raise RouterError(
                f"branch {self.world.branch} has no edges {foreign} as student; its edges: "
                f"{[edge.name for edge in learning]}"
            )
        self._exchange += 1
        this = _Exchange(
            number=self._exchange,
            asked={edge: list(outgoing.get(edge, ())) for edge in learning},
            traffic={edge: EdgeTraffic() for edge in (*learning, *teaching)},
        )
        self._open.append(this)
        with self._watch.operation(f"opd.post {this.number}"):
            self._post_headers(this)
            this.lanes_of = {edge: self._send_requests(this, edge) for edge in learning}

    def answer(self, score: ScoreFunction) -> dict[Edge, list[TeacherScore]]:
        """``teach(score)`` and ``collect()`` of the oldest open exchange, in which nothing of it stays under
        way."""
        this = self._open[0]
        with self._watch.operation(f"opd.exchange {this.number}"):
            self._teach_all(this, score)
            scores = self._collect_all(this)
            self._wait_for_sends(this.number)
        return scores

    def teach(self, score: ScoreFunction) -> None:
        """Scores the rows that this branch teaches in the oldest open exchange; waits for the rows.

        Args:
            score: called for each edge out of this branch that has rows.

        Raises:
            RouterError: a row or a score that cannot be right, or ranks that are not in the same exchange.
            CollectiveError: another rank died.
        """
        this = self._open[0]
        with self._watch.operation(f"opd.exchange {this.number}"):
            self._teach_all(this, score)

    def collect(self) -> dict[Edge, list[TeacherScore]]:
        """Waits for the scores of the rows that this branch has posted in the oldest open exchange, which
        ends. The scores that it has sent in it may still be under way: it does not wait for its students.

        Returns:
            For every edge into this branch, on all of its ranks, the scores in the rows' order.

        Raises:
            RouterError, CollectiveError: as ``teach``.
        """
        this = self._open[0]
        assert this.taught, "a branch that waits for answers has given its own"
        with self._watch.operation(f"opd.exchange {this.number}"):
            scores = self._collect_all(this)
            self._wait_for_sends(this.number, but_scores=True)
        return scores

    def _teach_all(self, this: _Exchange, score: ScoreFunction) -> None:
        for edge in self.graph.out_of(self.world.branch):
            self._teach(this, edge, score)
        this.taught = True

    def _collect_all(self, this: _Exchange) -> dict[Edge, list[TeacherScore]]:
        scores = {edge: self._receive_scores(this, edge) for edge in this.asked}
        self.traffic = this.traffic
        self._open.popleft()
        return scores

    def _wait_for_sends(self, number: int, *, but_scores: bool = False) -> None:
        """Waits until what was sent up to this exchange has left; ``but_scores``: not for its scores."""

        def stays(sent: _Sent) -> bool:
            return sent.exchange > number or (but_scores and (sent.exchange, sent.kind) == (number, SCORES))

        with self._watch.operation("opd.wait for sends"):
            for sent in self._sends:
                if not stays(sent):
                    sent.work.wait()
        self._sends = [sent for sent in self._sends if stays(sent)]

    # Student.

    def _send_requests(self, this: _Exchange, edge: Edge) -> tuple[tuple[int, ...], ...]:
        """Post this rank's lanes of an edge; which rows go over which lane."""
        requests = this.asked[edge]
        this.traffic[edge].num_rows = len(requests)
        lanes = self.plan.lanes[edge]
        rows_of = split_rows([len(request.token_ids) for request in requests], len(lanes))
        for lane, positions in zip(lanes, rows_of, strict=True):
            if lane.source == self.world.rank:
                message = pack_requests(
                    requests,
                    positions,
                    exchange=this.number,
                    edge=self._index[edge],
                    lane=lane.index,
                    encoded=self._encoded,
                )
                self._send(this, lane, message, lane.destination)
        return rows_of

    def _receive_scores(self, this: _Exchange, edge: Edge) -> list[TeacherScore]:
        requests, rows_of = this.asked[edge], this.lanes_of[edge]
        by_position: dict[int, TeacherScore] = {}
        with self._operation("opd.receive scores", edge):
            messages = self._receive(this, edge, SCORES)
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

    def _teach(self, this: _Exchange, edge: Edge, score: ScoreFunction) -> None:
        lanes, traffic = self.plan.lanes[edge], this.traffic[edge]
        with self._operation("opd.receive rows", edge):
            messages = self._receive(this, edge, REQUESTS)
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
                    scores, positions, exchange=this.number, edge=self._index[edge], lane=lane.index,
                    crc=message.header.ids_crc,
                )  # fmt: skip
                self._send(this, lane, answer, lane.source)

    def _check_ids(self, rows: Sequence[ScoreRequest | TeacherScore], origin: str) -> None:
        if self._vocab_size is not None:
            check_ids(rows, self._vocab_size, origin)

    # Transport.

    def _post_headers(self, this: _Exchange) -> None:
        """Post the receives of all headers that this rank will get in an exchange."""
        expected = [(lane, REQUESTS, lane.source) for lane in self.plan.receives_of(self.world.rank)]
        expected += [(lane, SCORES, lane.destination) for lane in self.plan.sends_of(self.world.rank)]
        for lane, kind, peer in expected:
            buffer = torch.empty(HEADER_FIELDS, dtype=torch.int64)
            work = self.world.router.recv([buffer], peer, self._tag(this, lane, kind, 0))
            this.headers[lane, kind] = (work, buffer)

    def _send(self, this: _Exchange, lane: Lane, message: Message, peer: int) -> None:
        kind = message.header.kind
        parts = [torch.from_numpy(message.header.pack())]
        if message.header.payload_bytes:
            parts.append(torch.from_numpy(message.payload))
        for part, buffer in enumerate(parts):
            work = self.world.router.send([buffer], peer, self._tag(this, lane, kind, part))
            self._sends.append(_Sent(exchange=this.number, kind=kind, work=work, buffer=buffer))
        this.traffic[lane.edge].sent_bytes += HEADER_BYTES + message.header.payload_bytes

    def _receive(self, this: _Exchange, edge: Edge, kind: int) -> list[Message]:
        """All lanes' messages of one direction of an edge, by lane, on every rank of this branch."""
        start = time.perf_counter()
        lanes = self.plan.lanes[edge]
        owners = [lane.destination if kind == REQUESTS else lane.source for lane in lanes]
        # A plan gives a rank at most one lane end of an edge.
        own = owners.index(self.world.rank) if self.world.rank in owners else None
        headers = torch.empty(len(lanes), HEADER_FIELDS, dtype=torch.int64)
        payload: torch.Tensor | None = None
        if own is not None:
            headers[own], payload = self._receive_own(this, lanes[own], kind)
        self._share(list(headers), owners)
        messages = []
        for i, lane in enumerate(lanes):
            header = self._header(this, headers[i], lane, kind)
            mine = payload is not None and i == own
            buffer = payload if mine else torch.empty(header.payload_bytes, dtype=torch.uint8)
            assert buffer is not None
            messages.append((header, buffer))
        self._share([buffer for _, buffer in messages], owners)
        this.traffic[edge].wait_seconds += time.perf_counter() - start
        return [Message(header=header, payload=buffer.numpy()) for header, buffer in messages]

    def _receive_own(self, this: _Exchange, lane: Lane, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Header and payload of the lane that this rank owns."""
        work, header_buffer = this.headers.pop((lane, kind))
        work.wait()
        header = self._header(this, header_buffer, lane, kind)
        payload = torch.empty(header.payload_bytes, dtype=torch.uint8)
        if header.payload_bytes:
            peer = lane.source if kind == REQUESTS else lane.destination
            self.world.router.recv([payload], peer, self._tag(this, lane, kind, 1)).wait()
        this.traffic[lane.edge].received_bytes += HEADER_BYTES + header.payload_bytes
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

    def _header(self, this: _Exchange, values: torch.Tensor, lane: Lane, kind: int) -> Header:
        what, peer = ("rows", lane.source) if kind == REQUESTS else ("scores", lane.destination)
        return Header.unpack(
            values.numpy(), self._origin(what, lane, peer), kind=kind, exchange=this.number,
            edge=self._index[lane.edge], lane=lane.index,
        )  # fmt: skip

    def _tag(self, this: _Exchange, lane: Lane, kind: int, part: int) -> int:
        """Unique among the messages that two ranks can have under way: an exchange overlaps only with the
        next."""
        tag = self._index[lane.edge] * self._max_lanes + lane.index
        return ((tag * _KINDS + kind) * _PARTS + part) * _PARITIES + this.number % _PARITIES

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
