"""Finds the places where our code reaches into private or undocumented parts of other packages.

Read off the source, without importing anything. What it sees:

- an import of a private name (``_x``), of a private module, or of a module in ``INTERNAL``;
- a private attribute of anything that cannot be ours: of something imported, or returned by something
  imported; of ``super()`` or ``self`` in a class with a foreign base; of any other expression where none of
  our modules defines that name;
- an assignment to an attribute of something imported: a patch;
- in the rooms that hold engines, an attribute set on an object, or looked up by a literal name, where none of
  our classes defines such an attribute.

What it cannot see: a public name that is not documented, and a private attribute of a local variable that has
the name of one of ours. The table lists those that we know of.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

OURS = "copd_megatron"
INTERNAL = ("vllm", "megatron.core.dist_checkpointing.strategies", "transformer_engine")
"""Modules whose content is not for users, but for those in ``DOCUMENTED``."""
DOCUMENTED = ("vllm", "vllm.sampling_params", "transformer_engine.pytorch")
CALLBACKS = ("finalize_model_grads_func", "no_sync_func")
"""Attributes that Megatron's configuration documents as the caller's to set."""
ENGINE_ROOMS = ("policy", "rollout", "weight_sync", "checkpoint")
_LOOKUPS = ("getattr", "setattr", "hasattr", "delattr")


@dataclass(frozen=True, order=True)
class Reach:
    """One place."""

    file: str
    """Relative to the package."""
    line: int
    name: str
    """What it reaches into, without the path to it."""
    patches: bool = False
    """It replaces something in another package for the whole process."""

    def __str__(self) -> str:
        return f"{OURS}/{self.file}:{self.line} reaches into {self.name}"


@dataclass(frozen=True, kw_only=True)
class _Class:
    """What one of our classes defines."""

    bases: tuple[str, ...]
    names: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class _Package:
    """What our modules define."""

    classes: dict[tuple[str, str], _Class]
    """By file and name."""
    names: frozenset[str]
    """Every name that is defined somewhere, at whatever depth."""
    attributes: frozenset[str]
    """Those of classes."""


def find_reaches(sources: Mapping[str, str]) -> list[Reach]:
    """All places in the files of a package, given by relative path."""
    trees = {file: ast.parse(source) for file, source in sources.items()}
    classes = {
        (file, found.name): _read_class(found)
        for file, tree in trees.items()
        for found in _all(tree, ast.ClassDef)
    }
    package = _Package(
        classes=classes,
        names=frozenset(name for tree in trees.values() for name in _defined(tree)),
        attributes=frozenset(name for found in classes.values() for name in found.names),
    )
    return sorted({reach for file, tree in trees.items() for reach in _Scan(file, tree, package).reaches()})


def package_sources(package: Path) -> dict[str, str]:
    """The package's files by relative path."""
    return {
        path.relative_to(package).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(package.rglob("*.py"))
    }


class _Scan:
    """One file."""

    def __init__(self, file: str, tree: ast.Module, package: _Package) -> None:
        self.file, self.tree, self.package = file, tree, package
        self.imported = {name: module for node in ast.walk(tree) for name, module in _bindings(node)}
        """Local name to the module that it is, or comes from."""
        self.made_elsewhere = {
            (id(function), name)
            for function in _all(tree, ast.FunctionDef)
            for name, value in _assigned(function)
            if isinstance(value, ast.Call) and self._is_of_another_package(value)
        }
        """Local variables that hold what another package's function returned."""
        self.holds_engines = file.split("/")[0] in ENGINE_ROOMS

    def reaches(self) -> Iterator[Reach]:
        for node, scope in _with_scope(self.tree, _Scope()):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield from self._imported(node)
            elif isinstance(node, ast.Attribute):
                yield from self._attribute(node, scope)
            elif isinstance(node, ast.Call):
                yield from self._lookup(node)

    def _imported(self, node: ast.Import | ast.ImportFrom) -> Iterator[Reach]:
        for module, name in _imports(node):
            path = f"{module}.{name}" if name else module
            if not _is_foreign(module):
                continue
            hidden = any(part.startswith("_") or part == "internal" for part in path.split("."))
            if hidden or (_below(module, INTERNAL) and module not in DOCUMENTED):
                yield Reach(self.file, node.lineno, path.rpartition(".")[2])

    def _attribute(self, node: ast.Attribute, scope: _Scope) -> Iterator[Reach]:
        sets = isinstance(node.ctx, ast.Store | ast.Del)
        if sets and self._is_of_another_package(node.value) and not isinstance(node.value, ast.Call):
            yield Reach(self.file, node.lineno, node.attr, patches=True)
        elif (_is_private(node.attr) and self._is_foreign_attribute(node, scope)) or (
            sets and self._is_set_on_an_engines_object(node)
        ):
            yield Reach(self.file, node.lineno, node.attr)

    def _is_of_another_package(self, node: ast.expr) -> bool:
        return _is_foreign(self.imported.get(_root(node) or "", OURS))

    def _is_foreign_attribute(self, node: ast.Attribute, scope: _Scope) -> bool:
        root = _root(node.value)
        of_super = isinstance(node.value, ast.Call) and root == "super"
        if scope.class_name is not None and (of_super or _is_name(node.value, "self", "cls")):
            known, has_foreign_base = self._of_class(scope.class_name, without_itself=of_super)
            return has_foreign_base and node.attr not in known
        if (scope.function, root) in self.made_elsewhere:
            return True
        if root in self.imported and not self.imported[root].startswith(OURS):
            return _is_foreign(self.imported[root])
        return node.attr not in self.package.names

    def _is_set_on_an_engines_object(self, node: ast.Attribute) -> bool:
        mine = _is_name(node.value, "self", "cls", "ctx")  # ctx: torch's autograd functions keep things in it
        known = node.attr in self.package.attributes or node.attr in CALLBACKS
        return self.holds_engines and not mine and not known

    def _lookup(self, node: ast.Call) -> Iterator[Reach]:
        if not (_is_name(node.func, *_LOOKUPS) and len(node.args) > 1):
            return
        match node.args[1]:
            case ast.Constant(value=str(name)) if name not in self.package.attributes:
                writes = _is_name(node.func, "setattr", "delattr")
                patches = writes and self._is_of_another_package(node.args[0])
                if patches or self.holds_engines or _is_private(name):
                    yield Reach(self.file, node.lineno, name, patches=patches)

    def _of_class(self, name: str, *, without_itself: bool) -> tuple[set[str], bool]:
        """What a class of this file and its bases among ours define; whether another package's is among
        them."""
        known: set[str] = set()
        pending, foreign = [(self.file, name)], False
        while pending:
            file, current = pending.pop()
            found = self.package.classes.get((file, current))
            if found is None:
                module = self.imported.get(current, "")
                home = module.removeprefix(OURS + ".").replace(".", "/") + ".py"
                if module.startswith(OURS) and (home, current) in self.package.classes:
                    pending.append((home, current))
                foreign = foreign or _is_foreign(module)
                continue
            pending += [(file, base) for base in found.bases]
            if not (without_itself and current == name):
                known |= found.names
        return known, foreign


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _is_foreign(module: str) -> bool:
    """Of a package that is neither ours nor Python's."""
    top = module.partition(".")[0]
    return bool(top) and top not in sys.stdlib_module_names and top != OURS


def _below(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _is_name(node: ast.expr, *names: str) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _root(node: ast.expr) -> str | None:
    """The name that an expression such as ``a.b(c)[d].e`` begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _imports(node: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(module, imported name) of an import statement."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, None) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
        yield from ((node.module, alias.name) for alias in node.names)


def _bindings(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(local name, module) that an import statement binds."""
    if isinstance(node, ast.Import):
        yield from ((alias.asname or alias.name.partition(".")[0], alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
        yield from ((alias.asname or alias.name, node.module) for alias in node.names)


@dataclass(frozen=True, kw_only=True)
class _Scope:
    """Where a node stands."""

    class_name: str | None = None
    function: int | None = None
    """Identity of the function's node."""


def _with_scope(tree: ast.AST, scope: _Scope) -> Iterator[tuple[ast.AST, _Scope]]:
    for node in ast.iter_child_nodes(tree):
        yield node, scope
        inner = scope
        if isinstance(node, ast.ClassDef):
            inner = _Scope(class_name=node.name)
        elif isinstance(node, ast.FunctionDef):
            inner = replace(scope, function=id(node))
        yield from _with_scope(node, inner)


def _assigned(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    """(name, value) of the plain assignments in a function."""
    for node in _all(function, ast.Assign):
        yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))


def _all[Node: ast.AST](tree: ast.AST, kind: type[Node]) -> Iterator[Node]:
    return (node for node in ast.walk(tree) if isinstance(node, kind))


def _read_class(node: ast.ClassDef) -> _Class:
    names = {item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.ClassDef)}
    for item in node.body:
        targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    names |= {
        target.attr
        for target in _all(node, ast.Attribute)
        if isinstance(target.ctx, ast.Store) and _is_name(target.value, "self", "cls")
    }
    return _Class(bases=tuple(_base_name(base) for base in node.bases), names=frozenset(names))


def _base_name(base: ast.expr) -> str:
    """``Sequence[int]`` is ``Sequence``; of ``nn.Module`` it is ``nn``, which is what the file imports."""
    return _root(base) or ""


def _defined(tree: ast.AST) -> Iterator[str]:
    """Every name that a file defines, at whatever depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and _is_name(node.value, "self", "cls")
        ):
            yield node.attr
