"""Requests and scores as bytes: a fixed header and one flat payload per lane. Pure.

A message is an int64 header of ``HEADER_FIELDS`` and a payload of ``payload_bytes``:

requests  table int64 [n, 12] (position, row id, L, P, weight version, asked flags, s, k of the top, k of the
          support, temperature in billionths, samples, longest sample), token ids int32, asked positions
          int32, support ids int32, media section (``media_section``)
scores    table int64 [n, 11] (position, row id, weight version, log-probabilities, s, V, R, k of the top,
          k of the support, entropies, samples), lengths of samples int32, samples' ids int32,
          log-probabilities float32, distributions float32, top ids int32, their log-probabilities float32,
          log-probabilities on the support float32, entropies float32

``position`` is the row's index in the edge's list, so that the receiver restores the order. ``payload_crc``
is the CRC-32 of the whole payload. ``ids_crc`` is that of the lane's token ids; scores carry that of the ids
they were computed from. Little-endian.

What arrives is checked whatever its CRC says: the sender may run other code, or have damaged memory.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, TypeGuard

import numpy as np
import numpy.typing as npt

from copd_megatron.opd.media_section import pack_media, unpack_media
from copd_megatron.opd.records import ScoreRequest, TeacherScore
from copd_megatron.records import Ask, FloatArray, MediaRef, TopK

FORMAT_VERSION: Final = 4
REQUESTS: Final = 0
SCORES: Final = 1

_MAGIC: Final = 0x434F5044
_REQUEST_COLUMNS: Final = 12
_SCORE_COLUMNS: Final = 11
_TOKENS: Final = 1
_ENTROPY: Final = 2
_TEMPERATURES: Final = 10**9
_MAX_PAYLOAD_BYTES: Final = 1 << 40
"""Above every exchange, so that a wrong length is told before memory is asked for."""
_MAX_SAMPLES: Final = 1 << 16
_MAX_TOKENS: Final = 1 << 24
_LOGPROB_ROUNDING: Final = 0.01
"""How far above 0 a log-probability may come out of a sum in low precision, in nats."""


class RouterError(RuntimeError):
    """A message does not fit what its receiver expects, or scores do not fit their requests."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """First part of every message. The fields' order is the wire's."""

    magic: int = _MAGIC
    format_version: int = FORMAT_VERSION
    kind: int
    """``REQUESTS`` or ``SCORES``."""
    exchange: int
    """Number of the exchange in this run: branches are in lock step."""
    edge: int
    """Index in the graph."""
    lane: int
    num_rows: int
    """In this lane."""
    edge_rows: int
    """In all lanes of the edge."""
    payload_bytes: int
    payload_crc: int
    ids_crc: int
    media_bytes: int = 0
    """Length of the media section at the payload's end (requests only)."""

    def pack(self) -> npt.NDArray[np.int64]:
        """[HEADER_FIELDS]"""
        return np.array([getattr(self, f.name) for f in fields(self)], dtype="<i8")

    @classmethod
    def unpack(cls, values: npt.NDArray[np.int64], origin: str, **expected: int) -> Header:
        """Check a header that was received.

        Args:
            values: [HEADER_FIELDS]
            origin: edge and rank, for the error.
            expected: fields that the receiver knows already.

        Raises:
            RouterError: naming origin, field, expected and received value; or a count that is none.
        """
        header = cls(**{f.name: int(v) for f, v in zip(fields(cls), values, strict=True)})
        for name, value in {"magic": _MAGIC, "format_version": FORMAT_VERSION, **expected}.items():
            received = getattr(header, name)
            if received != value:
                raise RouterError(
                    f"{origin}: header field {name} is {received}, expected {value}; every rank must run the "
                    "same code and configuration, and the branches the same step"
                )
        for name in ("num_rows", "edge_rows", "payload_bytes", "media_bytes"):
            received = getattr(header, name)
            if not 0 <= received <= _MAX_PAYLOAD_BYTES:
                raise RouterError(f"{origin}: header field {name} is {received}; {_LOOK_AT_THE_NETWORK}")
        return header


_LOOK_AT_THE_NETWORK: Final = (
    "the message was damaged on its way, or its sender runs other code; look at the network of both nodes"
)
HEADER_FIELDS: Final = len(fields(Header))
HEADER_BYTES: Final = 8 * HEADER_FIELDS


@dataclass(frozen=True, kw_only=True, eq=False)
class Message:
    """What travels over one lane in one direction."""

    header: Header
    payload: npt.NDArray[np.uint8]
    """[payload_bytes]"""


def ids_crc(requests: Sequence[ScoreRequest]) -> int:
    """CRC-32 of the rows' token ids and lengths, in order."""
    lengths = np.array([(len(r.token_ids), r.prompt_length) for r in requests], dtype="<i8")
    ids = [np.asarray(r.token_ids, dtype="<i4") for r in requests]
    return zlib.crc32(np.concatenate(ids) if ids else b"", zlib.crc32(lengths))


def pack_requests(
    requests: Sequence[ScoreRequest],
    positions: Sequence[int],
    *,
    exchange: int,
    edge: int,
    lane: int,
    encoded: Callable[[MediaRef], bytes] | None = None,
) -> Message:
    """One lane's requests.

    Args:
        requests: all of the edge's.
        positions: which of them go over this lane.
        encoded: gives the media files that travel with the rows; None: only references do.

    Raises:
        RouterError: a request whose lengths or asked positions are impossible.
    """
    rows = [requests[i] for i in positions]
    for row in rows:
        check_request(row)
    table = np.array(
        [
            (i, r.row_id, len(r.token_ids), r.prompt_length, r.weight_version,
             _TOKENS * r.ask.tokens + _ENTROPY * r.ask.entropy, len(r.ask.positions), r.ask.top_k,
             0 if r.support_ids is None else r.support_ids.shape[1],
             round(r.ask.temperature * _TEMPERATURES), r.ask.samples, r.ask.max_new_tokens)
            for i, r in zip(positions, rows, strict=True)
        ],
        dtype="<i8",
    ).reshape(len(rows), _REQUEST_COLUMNS)  # fmt: skip
    media = np.frombuffer(pack_media(rows, encoded), dtype=np.uint8)
    payload = _flat(
        [
            table,
            *(_as(r.token_ids, "<i4") for r in rows),
            *(_as(np.array(r.ask.positions), "<i4") for r in rows),
            *(_as(r.support_ids, "<i4") for r in rows if r.support_ids is not None),
            media,
        ]
    )
    header = Header(
        kind=REQUESTS, exchange=exchange, edge=edge, lane=lane, num_rows=len(rows), edge_rows=len(requests),
        payload_bytes=payload.nbytes, payload_crc=zlib.crc32(payload), ids_crc=ids_crc(rows),
        media_bytes=media.nbytes,
    )  # fmt: skip
    return Message(header=header, payload=payload)


def unpack_requests(message: Message, origin: str) -> dict[int, ScoreRequest]:
    """Requests by position. Arrays are views of the payload.

    Raises:
        RouterError: the payload is not the one that was sent, does not fit its header, or holds a row that
            no teacher could score.
    """
    check_payload(message, origin)
    with _damage(origin):
        rows = _requests_of(message, origin)
        for row in rows.values():
            check_request(row, f"{origin}, ")
    crc = ids_crc(list(rows.values()))
    if crc != message.header.ids_crc:
        raise RouterError(
            f"{origin}: token ids arrived with CRC {crc:#010x}, sent with {message.header.ids_crc:#010x}; "
            f"{_LOOK_AT_THE_NETWORK}"
        )
    return rows


def _requests_of(message: Message, origin: str) -> dict[int, ScoreRequest]:
    header, payload = message.header, message.payload
    reader = _Reader(payload, origin)
    table = reader.take("<i8", header.num_rows * _REQUEST_COLUMNS).reshape(-1, _REQUEST_COLUMNS)
    ids = reader.rows("<i4", table[:, 2])
    asked = reader.rows("<i4", table[:, 6])
    support = reader.rows("<i4", (table[:, 2] - table[:, 3]) * table[:, 8])
    section = reader.take("<u1", header.media_bytes)
    reader.finish()
    media, _ = unpack_media(section.tobytes(), header.num_rows)
    return {
        int(position): ScoreRequest(
            row_id=int(row_id), token_ids=ids[i], prompt_length=int(prompt), weight_version=int(version),
            ask=Ask(
                tokens=bool(flags & _TOKENS), entropy=bool(flags & _ENTROPY), top_k=int(top_k),
                support=bool(k), positions=tuple(asked[i].tolist()),
                temperature=int(heat) / _TEMPERATURES, samples=int(samples), max_new_tokens=int(longest),
            ),
            support_ids=support[i].reshape(-1, k) if k else None, media=media[i],
        )
        for i, (position, row_id, _, prompt, version, flags, _, top_k, k, heat, samples, longest)
        in enumerate(table)
    }  # fmt: skip


def media_files(message: Message, origin: str) -> dict[MediaRef, bytes]:
    """Media files that came with a lane's requests. Raises ``RouterError`` as ``unpack_requests``."""
    begin = message.payload.nbytes - message.header.media_bytes
    with _damage(origin):
        return unpack_media(message.payload[begin:].tobytes(), message.header.num_rows)[1]


def check_payload(message: Message, origin: str) -> None:
    """Raises ``RouterError`` if a payload is not, byte for byte, the one that its header was made for."""
    header, payload = message.header, message.payload
    if payload.nbytes != header.payload_bytes:
        raise RouterError(
            f"{origin}: the payload has {payload.nbytes} bytes, its header promises {header.payload_bytes}; "
            f"{_LOOK_AT_THE_NETWORK}"
        )
    crc = zlib.crc32(payload)
    if crc != header.payload_crc:
        raise RouterError(
            f"{origin}: {payload.nbytes} bytes arrived with CRC {crc:#010x}, sent with "
            f"{header.payload_crc:#010x}; {_LOOK_AT_THE_NETWORK}"
        )


@contextlib.contextmanager
def _damage(origin: str) -> Iterator[None]:
    """What a payload that makes no sense raises becomes an error that names its sender."""
    try:
        yield
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RouterError(
            f"{origin}: the payload makes no sense ({reason}); {_LOOK_AT_THE_NETWORK}"
        ) from error


def pack_scores(
    scores: Sequence[TeacherScore], positions: Sequence[int], *, exchange: int, edge: int, lane: int, crc: int
) -> Message:
    """One lane's scores. ``scores``: all of the edge's; ``positions``: this lane's; ``crc``: of its
    requests."""
    rows = [scores[i] for i in positions]
    table = np.array(
        [
            (
                i,
                r.row_id,
                r.weight_version,
                len(r.logprobs),
                *r.distributions.shape,
                *_shape_of_answers(r),
                len(r.samples),
            )
            for i, r in zip(positions, rows, strict=True)
        ],
        dtype="<i8",
    ).reshape(len(rows), _SCORE_COLUMNS)
    payload = _flat(
        [
            table,
            *(_as(np.array([len(s) for s in r.samples]), "<i4") for r in rows),
            *(_as(s, "<i4") for r in rows for s in r.samples),
            *(_as(r.logprobs, "<f4") for r in rows),
            *(_as(r.distributions, "<f4") for r in rows),
            *(_as(r.top.ids, "<i4") for r in rows if r.top is not None),
            *(_as(r.top.logprobs, "<f4") for r in rows if r.top is not None),
            *(_as(r.support_logprobs, "<f4") for r in rows if r.support_logprobs is not None),
            *(_as(r.entropy, "<f4") for r in rows if r.entropy is not None),
        ]
    )
    header = Header(
        kind=SCORES, exchange=exchange, edge=edge, lane=lane, num_rows=len(rows), edge_rows=len(scores),
        payload_bytes=payload.nbytes, payload_crc=zlib.crc32(payload), ids_crc=crc,
    )  # fmt: skip
    return Message(header=header, payload=payload)


def unpack_scores(message: Message, origin: str) -> dict[int, TeacherScore]:
    """Scores by position. Arrays are views of the payload. Raises ``RouterError`` as ``unpack_requests``;
    whether they answer their requests is for ``check_scores`` to say."""
    check_payload(message, origin)
    with _damage(origin):
        return _scores_of(message, origin)


def _scores_of(message: Message, origin: str) -> dict[int, TeacherScore]:
    header, payload = message.header, message.payload
    reader = _Reader(payload, origin)
    table = reader.take("<i8", header.num_rows * _SCORE_COLUMNS).reshape(-1, _SCORE_COLUMNS)
    lengths = reader.rows("<i4", table[:, 10])
    samples = [tuple(reader.rows("<i4", counts.astype(np.int64))) for counts in lengths]
    logprobs = reader.rows("<f4", table[:, 3])
    distributions = reader.rows("<f4", table[:, 4] * table[:, 5])
    top_ids = reader.rows("<i4", table[:, 6] * table[:, 7])
    top_logprobs = reader.rows("<f4", table[:, 6] * table[:, 7])
    support = reader.rows("<f4", table[:, 6] * table[:, 8])
    entropy = reader.rows("<f4", table[:, 9])
    reader.finish()
    return {
        int(position): TeacherScore(
            row_id=int(row_id), weight_version=int(version), logprobs=logprobs[i],
            distributions=distributions[i].reshape(s, v),
            top=_top(top_ids[i], top_logprobs[i], top),
            support_logprobs=support[i].reshape(-1, k) if k else None,
            entropy=entropy[i] if count else None, samples=samples[i],
        )
        for i, (position, row_id, version, _, s, v, _, top, k, count, _) in enumerate(table)
    }  # fmt: skip


def _top(ids: npt.NDArray[Any], logprobs: npt.NDArray[Any], k: int) -> TopK | None:
    return TopK(ids=ids.reshape(-1, k), logprobs=logprobs.reshape(-1, k)) if k else None


def _shape_of_answers(score: TeacherScore) -> tuple[int, int, int, int]:
    """(R, k of the top, k of the support, entropies) of what is answered token by token."""
    arrays = [score.support_logprobs, None if score.top is None else score.top.logprobs]
    length = next((len(array) for array in arrays if array is not None), 0)
    return (
        length,
        0 if score.top is None else score.top.ids.shape[1],
        0 if score.support_logprobs is None else score.support_logprobs.shape[1],
        0 if score.entropy is None else len(score.entropy),
    )


def check_request(request: ScoreRequest, origin: str = "") -> None:
    """Raises ``RouterError`` for a row that no teacher could score. ``origin`` stands before the message."""
    length, positions = len(request.token_ids), request.ask.positions
    if not 0 < request.prompt_length <= length:
        raise RouterError(
            f"{origin}row {request.row_id}: prompt_length is {request.prompt_length} in a row of {length} "
            "tokens; it must be 1 .. number of tokens"
        )
    if positions and (min(positions) < 0 or max(positions) >= request.response_length):
        raise RouterError(
            f"{origin}row {request.row_id}: asked positions {list(positions)} must lie in 0 .. "
            f"{request.response_length - 1}, as they count response tokens"
        )
    ask = request.ask
    if not (
        0 <= ask.samples <= _MAX_SAMPLES and 0 <= ask.max_new_tokens <= _MAX_TOKENS and ask.top_k >= 0
    ) or not (0 < ask.temperature < math.inf):
        raise RouterError(
            f"{origin}row {request.row_id}: {ask.samples} samples of {ask.max_new_tokens} tokens, the "
            f"likeliest {ask.top_k} ids at temperature {ask.temperature:g} are asked for: nobody can answer"
        )
    ids = request.support_ids
    if request.ask.support != (ids is not None) or (
        ids is not None and (ids.ndim != 2 or len(ids) != request.response_length or not ids.shape[1])
    ):
        raise RouterError(
            f"{origin}row {request.row_id}: support ids of shape "
            f"{None if ids is None else list(ids.shape)}, asked: {request.ask.support}; "
            f"give [{request.response_length}, k] ids where they are asked about"
        )


def check_scores(requests: Sequence[ScoreRequest], scores: Sequence[TeacherScore], origin: str) -> None:
    """Whether scores answer their requests, row by row.

    Raises:
        RouterError: other rows, other lengths, missing answers, samples longer than asked, what is no
            log-probability or entropy, or more than one weight version.
    """
    if len(scores) != len(requests):
        raise RouterError(f"{origin}: {len(scores)} scores for {len(requests)} rows")
    for request, score in zip(requests, scores, strict=True):
        tokens = request.response_length if request.ask.tokens else 0
        asked = request.ask
        expected = (request.row_id, asked.samples, tokens, len(asked.positions), *_answers_to(request))
        got = (
            score.row_id, len(score.samples), len(score.logprobs), len(score.distributions),
            *_shape_of_answers(score),
        )  # fmt: skip
        if got != expected:
            raise RouterError(
                f"{origin}: (row id, samples, log-probabilities, distributions, R, k of the top, k of the "
                f"support, entropies) are {got} in the score, {expected} in the request; a teacher must "
                "answer its rows in their order, in full"
            )
        if (found := _first_impossible(score)) is not None:
            where, value = found
            raise RouterError(
                f"{origin}: log-probability of response token {where} in row {request.row_id} is {value:g}; "
                "check the teacher's weights"
            )
        longest = max(map(len, score.samples), default=0)
        if longest > asked.max_new_tokens:
            raise RouterError(
                f"{origin}: a sample of row {request.row_id} has {longest} tokens, {asked.max_new_tokens} "
                "were asked for at most; all branches must run the same code"
            )
    versions = sorted({score.weight_version for score in scores})
    if len(versions) > 1:
        raise RouterError(f"{origin}: rows were scored by weight versions {versions}; one step must use one")


def _answers_to(request: ScoreRequest) -> tuple[int, int, int, int]:
    """``_shape_of_answers`` of a full answer."""
    ask, length = request.ask, request.response_length
    k = 0 if request.support_ids is None else request.support_ids.shape[1]
    return (length if ask.top_k or k else 0, ask.top_k, k, length if ask.entropy else 0)


def check_ids(rows: Sequence[ScoreRequest | TeacherScore], vocab_size: int, origin: str) -> None:
    """Raises ``RouterError`` for a token id that a vocabulary does not have, or for more ids than it has."""
    for row in rows:
        if isinstance(row, ScoreRequest) and row.ask.top_k > vocab_size:
            raise RouterError(
                f"{origin}: row {row.row_id} asks for the likeliest {row.ask.top_k} ids, the vocabulary has "
                f"{vocab_size}; all branches need the same tokenizer"
            )
        for what, ids, least in _ids_of(row):
            if ids.size and not (ids.min() >= least and ids.max() < vocab_size):
                raise RouterError(
                    f"{origin}: {what} of row {row.row_id} lie in {ids.min()} .. {ids.max()}, the vocabulary "
                    f"has 0 .. {vocab_size - 1}; all branches need the same tokenizer"
                )


def _ids_of(row: ScoreRequest | TeacherScore) -> Iterator[tuple[str, npt.NDArray[Any], int]]:
    """(what, ids, least id) of all ids in a row."""
    if isinstance(row, TeacherScore):
        yield from (("sampled ids", ids, 0) for ids in row.samples)
        if row.top is not None:
            yield "likeliest ids", row.top.ids, 0
        return
    yield "token ids", np.asarray(row.token_ids), 0
    if row.support_ids is not None:
        yield "support ids", row.support_ids, -1  # an empty place


def _first_impossible(score: TeacherScore) -> tuple[int, float] | None:
    """The first response token of which a score says what is no log-probability or entropy, and that value.
    A log-probability may be minus infinity: of an id that is never sampled."""
    told = [score.logprobs, score.support_logprobs, score.distributions]
    told.append(None if score.top is None else score.top.logprobs)
    found = [_first(array, ~(array <= _LOGPROB_ROUNDING)) for array in told if _may_be_wrong(array)]
    if score.entropy is not None:
        possible = np.isfinite(score.entropy) & (score.entropy >= -_LOGPROB_ROUNDING)
        found.append(_first(score.entropy, ~possible))
    return min((place for place in found if place is not None), default=None)


def _may_be_wrong(array: FloatArray | None) -> TypeGuard[FloatArray]:
    """Whether an array's largest value, NaN counted, is no log-probability; one pass, without a copy."""
    return array is not None and array.size > 0 and not array.max() <= _LOGPROB_ROUNDING


def _first(array: npt.NDArray[Any], wrong: npt.NDArray[np.bool_]) -> tuple[int, float] | None:
    """Row and value of the first wrong element of [rows, ...]."""
    if not wrong.any():
        return None
    place = int(np.flatnonzero(wrong.reshape(-1))[0])
    return place // (array.size // len(array)), float(array.reshape(-1)[place])


class _Reader:
    """Cuts a payload into arrays."""

    def __init__(self, payload: npt.NDArray[np.uint8], origin: str) -> None:
        self._payload, self._origin, self._offset = payload, origin, 0

    def take(self, dtype: str, count: int) -> npt.NDArray[Any]:
        size = np.dtype(dtype).itemsize * count
        end = self._offset + size
        if count < 0 or end > self._payload.nbytes:
            raise RouterError(
                f"{self._origin}: the payload of {self._payload.nbytes} bytes ends before byte {end}, which "
                "its row table promises"
            )
        part = self._payload[self._offset : end].view(dtype)
        self._offset = end
        return part

    def rows(self, dtype: str, counts: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
        if len(counts) == 0:
            return []
        if ((counts < 0) | (counts > self._payload.nbytes)).any():  # sums of more could wrap around
            raise RouterError(
                f"{self._origin}: the row table promises {int(counts.min())} to {int(counts.max())} values "
                f"of a row in {self._payload.nbytes} bytes"
            )
        return np.split(self.take(dtype, int(counts.sum())), np.cumsum(counts)[:-1])

    def finish(self) -> None:
        if self._offset != self._payload.nbytes:
            raise RouterError(
                f"{self._origin}: the payload has {self._payload.nbytes} bytes, its row table promises "
                f"{self._offset}"
            )


def _as(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    return np.ascontiguousarray(array, dtype=dtype).reshape(-1)


def _flat(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])
