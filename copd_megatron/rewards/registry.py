"""Verifiers by name: the built-in ones, and any ``package.module:attribute``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copd_megatron.rewards import verifiers as builtin
from copd_megatron.untrusted.regular_file import sha256_of

Verify = Callable[[str, str, Mapping[str, Any]], float]
"""(response, gold answer, metadata) -> reward, usually 0 or 1. Same arguments, same reward."""


class UnknownVerifierError(ValueError):
    """A verifier's name that cannot be resolved: says which, what is known, and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Verifier:
    """A verifier and how it wants to be run."""

    name: str
    verify: Verify
    isolated: bool
    """Runs in a process of its own that is killed when it takes too long. Only a verifier that surely ends
    in no time (a string comparison, say) should run in the trainer's process."""
    reusable: bool = False
    """Evaluates nothing that it is given, so that the process may grade the next response, too. Otherwise
    every response gets a fresh process."""
    reads_final_answer: bool = False
    """Grades what ``final_answer`` finds and nothing else, so that a response that was cut off before it gave
    an answer scores 0."""
    prepare: Callable[[], None] | None = None
    """Called once, outside the time limit, before the processes that grade are forked: slow imports, and
    whatever else they should all find ready."""
    gold_is_a_response: bool = True
    """A response that gives the gold answer scores 1. Not so where the gold answer is a test or a region."""
    requires: Callable[[], None] | None = None
    """Called before a run starts. Raises ConfigError where this machine lacks what the verifier needs."""

    @property
    def target(self) -> str:
        """``module:attribute`` under which another process finds the function."""
        return f"{self.verify.__module__}:{self.verify.__qualname__}"


_registered: dict[str, Verifier] = {}


def register(
    name: str,
    *,
    isolated: bool = True,
    reusable: bool = False,
    reads_final_answer: bool = False,
    prepare: Callable[[], None] | None = None,
    gold_is_a_response: bool = True,
    requires: Callable[[], None] | None = None,
) -> Callable[[Verify], Verify]:
    """Decorator: make a module-level function available as verifier ``name``. The other arguments are those
    of ``Verifier``.

    Raises ValueError: the name is taken by another function, or the function is not at module level (a
    worker process could not import it).
    """

    def decorate(verify: Verify) -> Verify:
        verifier = Verifier(
            name=name,
            verify=verify,
            isolated=isolated,
            reusable=reusable,
            reads_final_answer=reads_final_answer,
            prepare=prepare,
            gold_is_a_response=gold_is_a_response,
            requires=requires,
        )
        if "." in verify.__qualname__ or verify.__qualname__ == "<lambda>":
            raise ValueError(
                f"verifier {name!r}: {verifier.target} is not a module-level function. Define it with def at "
                "the top level of a module, so that a worker process can import it."
            )
        other = _registered.get(name)
        if other is not None and other.target != verifier.target:
            raise ValueError(f"verifier {name!r} is already {other.target}. Register another name.")
        _registered[name] = verifier
        return verify

    return decorate


def known() -> list[str]:
    """Names that ``get`` resolves without a module path."""
    return sorted({module.name for module in pkgutil.iter_modules(builtin.__path__)} | set(_registered))


def get(name: str) -> Verifier:
    """The verifier of this name: registered, built in, or ``package.module:attribute``.

    A function given by path runs isolated unless it is registered otherwise.

    Raises UnknownVerifierError with the known and the nearest names.
    """
    if name in _registered:
        return _registered[name]
    if ":" in name:
        return _by_path(name)
    if name in known():
        importlib.import_module(f"{builtin.__name__}.{name}")
        return _registered[name]
    refuse_unknown(name)
    raise AssertionError("known names have been imported above")


def refuse_unknown(name: str) -> None:
    """Raises UnknownVerifierError, with the nearest name, for one that is neither built in nor registered nor
    a path. Imports no verifier."""
    if ":" in name or name in known():
        return
    near = difflib.get_close_matches(name, known(), n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise UnknownVerifierError(
        f"unknown verifier {name!r}; known: {', '.join(known())}. {hint}"
        "Name one of these, or your own as package.module:function."
    )


def own_digests(names: Iterable[str]) -> dict[str, str]:
    """Digests of the files of verifiers of the user's own: a corrected one gives other rewards under the same
    name."""
    found = {}
    for name in names:
        spec = importlib.util.find_spec(name.partition(":")[0]) if ":" in name else None
        if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
            found[name] = sha256_of(Path(spec.origin))
    return found


def named_by_data(name: str, trusted: Collection[str] = ()) -> Verifier:
    """The verifier of a name that stands in a file: a line of data, a recorded response, another run's
    settings.

    What is named by path is imported and called with texts of the same file: ``shutil:rmtree`` would delete
    what the line says. So it must be among ``trusted``, the names that the person who runs this has given.

    Raises UnknownVerifierError: it is not, or as ``get``.
    """
    if ":" in name and name not in trusted:
        raise UnknownVerifierError(
            f"verifier {name!r:.200} is a function that the data name; it would be imported and called. If "
            f"it is yours, allow it with --allow-verifier {name!r:.200}."
        )
    return get(name)


def _by_path(name: str) -> Verifier:
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UnknownVerifierError(
            f"verifier {name!r} cannot be imported: {error}. Check module and function name, and that the "
            "module is on PYTHONPATH on every node."
        ) from error
    if not callable(function):
        raise UnknownVerifierError(
            f"verifier {name!r} is a {type(function).__name__}, not a function of (response, answer, "
            "metadata). Point to the function."
        )
    for verifier in _registered.values():
        if verifier.verify is function:
            return verifier
    return Verifier(name=name, verify=function, isolated=True)


def resolve(names: Iterable[str]) -> dict[str, Verifier]:
    """Verifiers by every name that samples may use for them. Raises UnknownVerifierError."""
    found: dict[str, Verifier] = {}
    for name in names:
        verifier = get(name)
        found[name] = verifier
        found[verifier.name] = verifier
    return found


def check_requirements(names: Iterable[str]) -> None:
    """Raises ConfigError where this machine lacks what a verifier needs, UnknownVerifierError."""
    for verifier in resolve(names).values():
        if verifier.requires is not None:
            verifier.requires()
