"""webdataset shards: finding them, indexing them by headers only, and random access by (shard, key).

A shard is a plain ``.tar`` in webdataset's layout (see ``samples.py``). Opening one reads tar headers only,
so its index costs the same whether its members are texts or videos; samples are read one by one, when they
are needed.

The ``webdataset`` package fetches shards that are not files of this machine (``remote.py``). It does not read
them here, because it streams each shard in file order, while a run needs a global order that (seed, epoch)
determines, and access by reference from other branches; it also imports torch. Tests hold that it reads the
shards written here, byte for byte its own, and that shards it writes are read.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

from copd_megatron.data.braces import MAX_ALTERNATIVES, alternatives
from copd_megatron.data.globs import Budget, names_like
from copd_megatron.data.media import refuse_large as refuse_large_medium
from copd_megatron.data.remote import fetch, is_remote
from copd_megatron.data.samples import Sample, SampleRef, parse_sample, refuse_large
from copd_megatron.data.tar_scan import BLOCK_BYTES, TarDamageError, scan_open_tar
from copd_megatron.errors import BadSampleError, DataError
from copd_megatron.untrusted.regular_file import FileState, open_regular

_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_HASHED_BYTES = 4096
_REWRITE = "Write it again: the program that made it was probably interrupted."


def expand_patterns(
    patterns: Sequence[str], *, local_only: bool = False, budget: Budget | None = None
) -> list[Path]:
    """Shard files that paths, globs and brace ranges (``train-{000000..000007}.tar``) name, in order.

    The matches of each pattern are sorted by name; a file named twice is taken once. ``~`` is expanded.
    Addresses and pipes (see ``remote.py``) are fetched first.

    Args:
        local_only: leave addresses and pipes out. Nothing is fetched and no command runs, whatever the
            patterns say.
        budget: names that may be looked at; None: as many as these patterns may need.

    Raises DataError for an empty list, a pattern that matches nothing, a member of a brace range that does
    not exist, too many names, too many names to look at, or a shard that cannot be fetched.
    """
    if not patterns:
        raise DataError("no shards are named. List paths, globs or brace ranges of .tar files.")
    found: dict[Path, None] = {}
    looking = budget or Budget()
    for pattern, alternative in _alternatives(patterns):
        if is_remote(alternative):
            if not local_only:
                found[fetch(alternative).absolute()] = None
        else:
            found.update((path, None) for path in _matches(alternative, pattern, looking))
    return list(found)


def names_remote(pattern: str) -> bool:
    """Whether any of the names that a pattern stands for has to be fetched. Raises DataError as above."""
    return any(is_remote(alternative) for _, alternative in _alternatives([pattern]))


def _alternatives(patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each pattern with each of the names that it stands for."""
    number = 0
    for pattern in patterns:
        try:
            expanded = alternatives(os.path.expanduser(pattern))
        except ValueError as error:
            raise DataError(
                f"shard pattern {pattern!r:.200}: {error}. Close every brace; * may stand for many names."
            ) from error
        for alternative in expanded:
            number += 1
            if number > MAX_ALTERNATIVES:
                raise DataError(f"the patterns name more than {MAX_ALTERNATIVES} shards. Use * in them.")
            yield pattern, alternative


def _matches(alternative: str, pattern: str, budget: Budget) -> list[Path]:
    """The files that one name or glob matches."""
    if os.path.isdir(alternative):
        raise DataError(f"{alternative} is a folder, not a shard. Did you mean {alternative}/*.tar?")
    try:
        is_file = os.path.isfile(alternative)
        matches = [alternative] if is_file else sorted(names_like(alternative, budget))
    except ValueError as error:
        raise DataError(f"shard pattern {pattern!r:.200}: {error}. Name folders without *.") from error
    if not matches:
        of = f" (from {pattern!r})" if alternative != pattern else ""
        raise DataError(f"no shard matches {alternative!r}{of}. {_nothing_there(alternative)}")
    return [Path(match).absolute() for match in matches]


def _nothing_there(pattern: str) -> str:
    folder = Path(pattern).parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    if not folder.is_dir():
        return f"The folder {folder.absolute()} does not exist: check the path, or write the shards first."
    tars = sorted(path.name for path in folder.glob("*.tar"))
    holds = f"holds {len(tars)} .tar file(s), such as {tars[0]}" if tars else "holds no .tar file"
    return f"The folder {folder.absolute()} {holds}: check the name, or write the shards first."


class Member(NamedTuple):
    """One file of a sample: its extension, and where its bytes are in the shard."""

    extension: str
    offset: int
    size: int


@dataclass(frozen=True)
class ShardIndex:
    """Where everything in one shard is stored, read from its headers."""

    name: str
    path: Path
    samples: dict[str, tuple[Member, ...]]
    """By key, in file order."""
    state: FileState
    """Of the file, when it was indexed."""

    def find(self, key: str, extension: str) -> Member | None:
        """The sample's member with this extension, or None."""
        return next((member for member in self.samples[key] if member.extension == extension), None)

    def describe(self) -> Iterator[bytes]:
        """Its name, and the keys, extensions and sizes of all members, in order."""
        yield f"{self.name}\0{len(self.samples)}\n".encode()
        for key, members in self.samples.items():
            spans = ",".join(f"{member.extension}:{member.size}" for member in members)
            yield f"{key}\0{spans}\n".encode()

    @cached_property
    def contents(self) -> bytes:
        """Hash of the beginning and the end of every member, ``_HASHED_BYTES`` each: of all that most samples
        say, and little of a video. Raises DataError: the shard cannot be read any more, or has changed."""
        digest = hashlib.blake2b(digest_size=16)
        with _opened(self) as file:
            for members in self.samples.values():
                for member in members:
                    head = min(member.size, _HASHED_BYTES)
                    tail = min(member.size - head, _HASHED_BYTES)
                    for size, offset in ((head, member.offset), (tail, member.offset + member.size - tail)):
                        digest.update(os.pread(file.fileno(), size, offset) if size else b"")
        return digest.digest()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of ``describe`` and ``contents``."""
        return hashlib.sha256(b"".join([*self.describe(), self.contents])).hexdigest()[:16]

    @property
    def outline(self) -> str:
        """Hash of ``describe`` alone, which was the fingerprint in earlier versions."""
        return hashlib.sha256(b"".join(self.describe())).hexdigest()[:16]


def index_shard(path: Path, name: str | None = None) -> ShardIndex:
    """Index a shard by scanning its tar headers.

    Raises DataError: the file cannot be opened, is compressed, not a tar, cut off or damaged, has no samples,
    no sample with a ``.json`` member, or a member name twice.
    """
    _refuse_unreadable(path)
    samples: dict[str, dict[str, Member]] = {}
    try:
        with open_regular(path, buffered=False) as file:
            state = FileState.of(file.fileno())
            for entry in scan_open_tar(file.fileno()):
                match = _MEMBER.fullmatch(entry.name)
                if match is None:
                    continue
                key, extension = match.group(1), sys.intern(match.group(2).lower())
                members = samples.setdefault(key, {})
                if extension in members:
                    raise DataError(f"shard {path}: member {entry.name!r} occurs twice. Give every key once.")
                members[extension] = Member(extension, entry.offset, entry.size)
    except (TarDamageError, OSError) as error:
        raise DataError(f"shard {path}: not a readable tar ({error}). {_REWRITE}") from error
    if not samples:
        raise DataError(f"shard {path}: empty, it holds no samples. {_REWRITE}")
    if not any("json" in members for members in samples.values()):
        key, members = next(iter(samples.items()))
        raise DataError(
            f"shard {path}: no sample has a .json member (sample {key!r} has {sorted(members)}). "
            "Each sample needs <key>.json with prompt, answer, verifier; see tools/jsonl_to_shards.py."
        )
    return ShardIndex(
        name=name or path.stem,
        path=path,
        samples={key: tuple(members.values()) for key, members in samples.items()},
        state=state,
    )


def _refuse_unreadable(path: Path) -> None:
    try:
        with open_regular(path) as file:
            head = file.read(BLOCK_BYTES)
    except OSError as error:
        raise DataError(f"shard {path}: cannot be read ({error.strerror}). Check path and rights.") from error
    if not head:
        raise DataError(f"shard {path}: the file has no bytes. {_REWRITE}")
    if head[257:262] == b"ustar":
        return
    for magic, program in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                f"shard {path}: compressed with {program}, which allows no random access. Decompress it."
            )


def shard_names(paths: Sequence[Path]) -> list[str]:
    """A name for each shard, unique in the list: the stem, preceded by parent folders where stems collide."""
    names = [path.stem for path in paths]
    depth = 1
    while duplicates := {name for name, count in Counter(names).items() if count > 1}:
        depth += 1
        names = [
            "/".join((*path.parts[-depth:-1], path.stem)) if name in duplicates else name
            for name, path in zip(names, paths, strict=True)
        ]
        if depth > max(len(path.parts) for path in paths):
            raise DataError(f"shards {sorted(duplicates)} cannot be told apart by name. Rename one of them.")
    return names


class ShardSet:
    """Shards opened together: a sequence of sample references, and random access to what they name.

    >>> shards = ShardSet.open(["data/math-train-*.tar"])          # doctest: +SKIP
    >>> ref = shards.refs[0]                                        # doctest: +SKIP
    SampleRef(shard='math-train-000000', key='000000000')
    >>> shards.read(ref).answer, shards.read_member(ref, "0.png")   # doctest: +SKIP
    """

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        self.indexes = tuple(indexes)
        self._by_name = {index.name: index for index in self.indexes}
        self.refs: tuple[SampleRef, ...] = tuple(
            SampleRef(index.name, key) for index in self.indexes for key in index.samples
        )

    @classmethod
    def open(cls, patterns: Sequence[str]) -> ShardSet:
        """Expand the patterns and index every shard. Raises DataError as those two do."""
        paths = expand_patterns(patterns)
        names = shard_names(paths)
        return cls([index_shard(path, name) for path, name in zip(paths, names, strict=True)])

    def __len__(self) -> int:
        return len(self.refs)

    def __iter__(self) -> Iterator[SampleRef]:
        return iter(self.refs)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the names, keys, extensions and sizes of all members, in order, and of the beginning and
        the end of each."""
        parts = (part for index in self.indexes for part in (*index.describe(), index.contents))
        return _hash_of(parts)

    @cached_property
    def outline(self) -> str:
        """The same without beginnings and ends, which was the fingerprint in earlier versions."""
        return _hash_of(part for index in self.indexes for part in index.describe())

    def where(self, ref: SampleRef) -> str:
        """Names the sample in messages: file and key."""
        index = self._by_name.get(ref.shard)
        return f"shard {index.path if index else ref.shard}, sample {ref.key!r}"

    def read(self, ref: SampleRef, verifiers: Collection[str] | None = None) -> Sample:
        """Read and check one sample.

        Raises BadSampleError (no or broken JSON, wrong fields, verifier not in ``verifiers``), DataError
        (the reference names nothing here, or the file can no longer be read).
        """
        index = self._index_of(ref)
        where = self.where(ref)
        member = index.find(ref.key, "json")
        if member is None:
            held = sorted(member.extension for member in index.samples[ref.key])
            raise BadSampleError(
                where, "no_json", f"no .json member (it has {held})", "Add <key>.json or drop the sample."
            )
        refuse_large(member.size, where)
        media = tuple(other.extension for other in index.samples[ref.key] if other is not member)
        return parse_sample(self._read(index, member), ref, where, media=media, verifiers=verifiers)

    def read_member(self, ref: SampleRef, extension: str) -> bytes:
        """Bytes of one member, such as ``0.png``.

        Raises BadSampleError if the sample has no such member or one that is too large, DataError as ``read``
        does.
        """
        index = self._index_of(ref)
        member = index.find(ref.key, extension)
        if member is None:
            held = sorted(member.extension for member in index.samples[ref.key])
            raise BadSampleError(
                self.where(ref),
                "no_member",
                f"no .{extension} member (it has {held})",
                "Write the shard again.",
            )
        refuse_large_medium(extension, member.size, self.where(ref))
        return self._read(index, member)

    def _index_of(self, ref: SampleRef) -> ShardIndex:
        index = self._by_name.get(ref.shard)
        if index is None or ref.key not in index.samples:
            what = (
                "no sample with this key" if index else f"no such shard among {sorted(self._by_name)[:5]} ..."
            )
            raise DataError(f"{self.where(ref)}: {what}. Give every branch the same shards.")
        return index

    def _read(self, index: ShardIndex, member: Member) -> bytes:
        return read_bytes(index, member)


def read_bytes(index: ShardIndex, member: Member) -> bytes:
    """Bytes of a member of a shard. Raises DataError: the shard cannot be read any more, or has changed."""
    # Opened for each read: no descriptors to share or leak, thread-safe, and cheap compared with a step.
    with _opened(index) as file:
        file.seek(member.offset)
        data = bytearray()
        while len(data) < member.size and (chunk := file.read(member.size - len(data))):
            data += chunk
    if len(data) < member.size:
        raise DataError(f"shard {index.path}: became shorter while in use. Do not change it during a run.")
    return bytes(data)


@contextlib.contextmanager
def _opened(index: ShardIndex) -> Iterator[BinaryIO]:
    """A shard's file, as it was when it was indexed. Raises DataError as ``read_bytes``."""
    path = index.path
    try:
        with open_regular(path, as_of=index.state, buffered=False) as file:
            yield file
    except OSError as error:
        if error.errno == errno.ESTALE:
            raise DataError(
                f"shard {path}: has been changed or replaced while in use. Do not change it during a run."
            ) from error
        raise DataError(f"shard {path}: cannot be read any more ({error}). Put it back.") from error


def _hash_of(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def check_shards(patterns: Sequence[str], verifiers: Collection[str] | None = None) -> ShardSet:
    """Open the shards and check the first sample of each, so that bad data are refused before training.

    ``verifiers``: the names that samples may use; None: any. Returns the opened set.

    Raises DataError as ``ShardSet.open`` does, or because a first sample cannot be used.
    """
    shards = ShardSet.open(patterns)
    for index in shards.indexes:
        shards.read(SampleRef(index.name, next(iter(index.samples))), verifiers)
    return shards
