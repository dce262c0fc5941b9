"""Media decoded and processed ahead of time on other threads, in a cache bounded in bytes.

Each rank has one ``MediaLoader``. Shard sets are registered under names that all branches share; ``prefetch``
announces what will be needed, ``get`` and ``features`` return it. The results do not depend on the number of
threads, on what was announced, or on what the cache held; only the time they take does.

Announced media are decoded in order, as long as prefetched media that nobody has asked for yet fill at most
half of the cache; otherwise a large announcement would evict its own beginning. The cache exceeds its bound
only by what is being asked for. All threads together decode at most as many pixels at a time as a single
item may have (``media.max_pixels_hard_limit``).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType

from copd_megatron.config.schema import MediaConfig
from copd_megatron.data.decode import PixelBudget
from copd_megatron.data.media import MediaPlace, check_hash, content_hash, place_of
from copd_megatron.data.processing import ItemFeatures, MediaFeatures, MultimodalProcessor
from copd_megatron.data.samples import SampleRef
from copd_megatron.data.shards import ShardSet
from copd_megatron.errors import BadSampleError, DataError
from copd_megatron.records import MediaRef

_ABSENT = object()


@dataclass(frozen=True)
class _Loaded:
    """What was found at one place: features, or the reason why there are none."""

    digest: str
    item: ItemFeatures | None
    error: BadSampleError | None = None

    @property
    def nbytes(self) -> int:
        return self.item.nbytes if self.item is not None else 0


class MediaLoader:
    """Processed media by reference; safe to call from several threads.

    >>> loader = MediaLoader(processor, config.media)                  # doctest: +SKIP
    >>> loader.register("image/train", shards)                          # doctest: +SKIP
    >>> features = loader.features(prompt.media)                        # doctest: +SKIP
    """

    def __init__(self, processor: MultimodalProcessor, config: MediaConfig) -> None:
        self.processor = processor
        self._cache_bytes = config.cache_bytes
        self._budget = PixelBudget(config.max_pixels_hard_limit)
        self._pool = ThreadPoolExecutor(config.num_workers, "media") if config.num_workers else None
        self._max_running = config.num_workers
        self._sources: dict[str, ShardSet] = {}
        self._lock = threading.Lock()
        self._cache: OrderedDict[MediaPlace, _Loaded] = OrderedDict()
        self._shipped: dict[MediaPlace, bytes] = {}
        self._running: dict[MediaPlace, Future[_Loaded]] = {}
        self._waiting: deque[tuple[Hashable, MediaPlace]] = deque()
        self._unclaimed: dict[MediaPlace, Hashable] = {}
        """Places prefetched for an owner and not yet asked for; these are not evicted."""
        self._held_bytes = 0
        self._unclaimed_bytes = 0
        self._largest_bytes = 0
        self._counts = {"hits": 0, "misses": 0, "evictions": 0, "decoded": 0, "failed": 0}
        self._decode_seconds = 0.0
        self._wait_seconds = 0.0

    # ---- sources ---------------------------------------------------------------------------------------

    def register(self, source: str, shards: ShardSet) -> None:
        """Register a shard set under the name that all branches use for it, such as ``image/train``.

        Registering the same set again does nothing. Raises DataError if the name is taken by other shards.
        """
        known = self._sources.setdefault(source, shards)
        if known is not shards and known.fingerprint != shards.fingerprint:
            raise DataError(
                f"media source {source!r} is registered for other shards already. Give each shard set its "
                "own name."
            )

    def where(self, place: MediaPlace) -> str:
        """Names the place in messages: shard file, sample, member."""
        shards = self._sources.get(place.source)
        sample = SampleRef(place.shard, place.key)
        at = shards.where(sample) if shards is not None else f"shard {place.shard}, sample {place.key!r}"
        return f"{at}, member .{place.extension}"

    def encoded(self, ref: MediaRef) -> bytes:
        """The encoded file that a reference names, to be sent to a branch that cannot read this storage.

        Raises MediaMismatchError (the content differs from the reference), BadSampleError, DataError.
        """
        place = place_of(ref)
        data = self._read(place)
        check_hash(ref, content_hash(data), self.where(place))
        return data

    def put_encoded(self, ref: MediaRef, data: bytes) -> None:
        """Use a file that another branch sent instead of reading storage, until ``drop_encoded``.

        Raises MediaMismatchError if the content differs from the reference.
        """
        place = place_of(ref)
        check_hash(ref, content_hash(data), f"{self.where(place)} (shipped)")
        with self._lock:
            self._shipped[place] = data

    def drop_encoded(self) -> None:
        """Forget all files that were sent; features made from them stay in the cache."""
        with self._lock:
            self._shipped.clear()

    # ---- reading ---------------------------------------------------------------------------------------

    def prefetch(self, places: Iterable[MediaPlace], owner: Hashable = None) -> None:
        """Announce what will be asked for, in that order. Returns at once; without workers it does nothing.

        An owner's announcement replaces its previous one: media of that one that were not started are
        dropped, and those that nobody asked for may be evicted.
        """
        if self._pool is None:
            return
        with self._lock:
            fresh = dict.fromkeys(places)
            for place in [p for p, by in self._unclaimed.items() if by == owner and p not in fresh]:
                self._claim(place)
            self._waiting = deque(entry for entry in self._waiting if entry[0] != owner)
            self._waiting.extend((owner, place) for place in fresh)
        self._pump()

    def get(self, place: MediaPlace) -> tuple[MediaRef, ItemFeatures]:
        """Reference and features of one medium.

        Raises BadSampleError (the medium is missing or cannot be used, for whatever reason), DataError
        (unknown source or shard, file no longer readable).
        """
        loaded = self._get(place)
        if loaded.error is not None:
            raise loaded.error.again()
        assert loaded.item is not None
        return place.ref(loaded.digest), loaded.item

    def features(self, refs: Sequence[MediaRef]) -> MediaFeatures | None:
        """Features of a prompt's media, each checked against its reference; None without media.

        Raises MediaMismatchError, which names sample, shard and both hashes; otherwise as ``get``.
        """
        if not refs:
            return None
        items = []
        for ref in refs:
            place = place_of(ref)
            loaded = self._get(place)
            check_hash(ref, loaded.digest, self.where(place))
            if loaded.error is not None:
                raise loaded.error.again()
            assert loaded.item is not None
            items.append(loaded.item)
        return MediaFeatures(items=tuple(items))

    def counters(self) -> Mapping[str, float]:
        """Totals since the start, for metrics.

        Cache ``hits`` and ``misses`` (a hit may still have waited for a thread to finish), ``decoded``,
        ``failed``, ``evictions``, ``held_bytes``, ``decode_seconds`` (summed over threads) and
        ``wait_seconds`` (how long callers waited: decoding that was not hidden).
        """
        with self._lock:
            return {
                **self._counts,
                "held_bytes": self._held_bytes,
                "decode_seconds": self._decode_seconds,
                "wait_seconds": self._wait_seconds,
            }

    def close(self) -> None:
        """Stop the threads; announced media that were not started are dropped."""
        with self._lock:
            self._waiting.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> MediaLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- inside ----------------------------------------------------------------------------------------

    def _get(self, place: MediaPlace) -> _Loaded:
        future: Future[_Loaded] | None = None
        mine = False
        with self._lock:
            found = self._cache.get(place)
            if found is not None:
                self._cache.move_to_end(place)
                self._claim(place)
                self._evict(keep=place)
                self._counts["hits"] += 1
            else:
                future = self._running.get(place)
                mine = future is None
                if future is None:
                    future = self._running[place] = Future()
                self._counts["misses" if mine else "hits"] += 1
        if found is None:
            assert future is not None
            begin = time.perf_counter()
            if mine:
                self._load_into(place, future)
            try:
                found = future.result()
            except CancelledError:  # the loader was closed before a thread took it up
                return self._get(place)
            with self._lock:
                self._claim(place)
                self._wait_seconds += time.perf_counter() - begin
        self._pump()
        return found

    def _pump(self) -> None:
        """Start threads on what is waiting, as long as the cache has room for it."""
        if self._pool is None:
            return
        started: list[tuple[Hashable, MediaPlace, Future[_Loaded]]] = []
        with self._lock:
            while self._waiting and len(self._running) < self._max_running and self._has_room():
                owner, place = self._waiting.popleft()
                if place not in self._cache and place not in self._running:
                    future: Future[_Loaded] = Future()
                    self._running[place] = future
                    started.append((owner, place, future))
        for owner, place, future in started:
            try:
                task = self._pool.submit(self._work, owner, place, future)
            except RuntimeError:  # the loader was closed in the meantime
                self._abandon(place, future)
            else:
                task.add_done_callback(partial(self._abandon_if_cancelled, place, future))

    def _abandon_if_cancelled(self, place: MediaPlace, future: Future[_Loaded], task: Future[None]) -> None:
        if task.cancelled():
            self._abandon(place, future)

    def _abandon(self, place: MediaPlace, future: Future[_Loaded]) -> None:
        """Nobody will load the place; whoever waits for it does so itself."""
        with self._lock:
            if self._running.get(place) is future:
                del self._running[place]
        future.cancel()

    def _has_room(self) -> bool:
        """Whether one more item may be prefetched; those under way are taken to be as large as any so far."""
        if not self._unclaimed and not self._running:
            return True
        expected = self._unclaimed_bytes + (len(self._running) + 1) * self._largest_bytes
        return expected * 2 <= self._cache_bytes

    def _work(self, owner: Hashable, place: MediaPlace, future: Future[_Loaded]) -> None:
        self._load_into(place, future, prefetched_for=(owner,))
        self._pump()

    def _load_into(
        self, place: MediaPlace, future: Future[_Loaded], prefetched_for: tuple[Hashable] | None = None
    ) -> None:
        """Load a place and settle its future; an exception goes to those who wait for it."""
        try:
            loaded = self._load(place)
        except BaseException as error:
            with self._lock:
                self._running.pop(place, None)
            future.set_exception(error)
            return
        with self._lock:
            self._running.pop(place, None)
            self._cache[place] = loaded
            self._held_bytes += loaded.nbytes
            self._largest_bytes = max(self._largest_bytes, loaded.nbytes)
            if prefetched_for is not None:
                self._unclaimed[place] = prefetched_for[0]
                self._unclaimed_bytes += loaded.nbytes
            self._evict(keep=place)
        future.set_result(loaded)

    def _load(self, place: MediaPlace) -> _Loaded:
        begin = time.perf_counter()
        digest, item, problem = "", None, None
        try:
            data = self._read(place)
            digest = content_hash(data)
            with self._budget.share() as reserve:
                item = self.processor.decode_and_process(place.kind, data, self.where(place), reserve)
        except BadSampleError as error:
            problem = error.again()  # cached: it must not keep the pixels that the failed calls held
        with self._lock:
            self._decode_seconds += time.perf_counter() - begin
            self._counts["decoded" if problem is None else "failed"] += 1
        return _Loaded(digest, item, problem)

    def _read(self, place: MediaPlace) -> bytes:
        with self._lock:
            shipped = self._shipped.get(place)
        if shipped is not None:
            return shipped
        shards = self._sources.get(place.source)
        if shards is None:
            raise DataError(
                f"{self.where(place)}: this branch has no media source {place.source!r} (it has "
                f"{sorted(self._sources)}). Give every branch the same data.train and data.validation "
                "shards, or let the media travel with the requests."
            )
        return shards.read_member(SampleRef(place.shard, place.key), place.extension)

    def _claim(self, place: MediaPlace) -> None:
        """End the protection of a prefetched place. Call under the lock."""
        if self._unclaimed.pop(place, _ABSENT) is not _ABSENT:
            self._unclaimed_bytes -= self._cache[place].nbytes

    def _evict(self, keep: MediaPlace) -> None:
        """Drop what was used least recently until the rest fits; never ``keep``, nor what is unclaimed."""
        for place in list(self._cache):
            if self._held_bytes <= self._cache_bytes:
                return
            if place != keep and place not in self._unclaimed:
                self._held_bytes -= self._cache.pop(place).nbytes
                self._counts["evictions"] += 1
