"""Things that a configuration names: a file of the room, or an attribute of the user's own package.

An objective named ``grpo`` is the file ``copd_megatron/objectives/grpo.py``, which defines ``OBJECTIVE``; one
named ``my_package.mine:OBJECTIVE`` is found wherever Python finds ``my_package``. Recipes work the same way.
Nothing is imported to check a name, so a dry run needs neither torch nor an engine.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copd_megatron.errors import ConfigError

_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class Room:
    """A package whose files can be named."""

    package: str
    """``copd_megatron.objectives``"""
    attribute: str
    """What a file must define to be named: ``OBJECTIVE``."""

    def known(self) -> tuple[str, ...]:
        """Names of the built-in ones, in alphabetical order."""
        folder = Path(__file__).parent / self.package.removeprefix("copd_megatron.").replace(".", "/")
        defines = re.compile(rf"^{self.attribute}\b.*=", re.MULTILINE)
        return tuple(
            sorted(path.stem for path in folder.glob("*.py") if defines.search(path.read_text("utf-8")))
        )

    def check(self, name: str, key: str) -> None:
        """Whether ``name`` can be found. Imports at most the parent packages of a name of the user's own.

        Raises:
            ConfigError: naming ``key``, the nearest built-in name and where Python looked.
        """
        known = self.known()
        if name in known:
            return
        if not _OWN.fullmatch(name):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(
                f"{key}: there is no {name!r}; {hint}Built in: {', '.join(known)}. One of your own is named "
                f"package.module:{self.attribute}"
            )
        module = name.partition(":")[0]
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise ConfigError(
                f"{key}: {name!r}: Python finds no module {module}; install the package, or put the folder "
                "that holds it on PYTHONPATH"
            )

    def told(self, name: str, keyword: str) -> Any:
        """What ``name`` is given for a keyword where it is made, read from its source: nothing is imported.
        None: its source cannot be read, or does not say it plainly."""
        module, _, attribute = name.partition(":")
        if not attribute:
            module, attribute = f"{self.package}.{name}", self.attribute
        try:
            found = importlib.util.find_spec(module)
            text = "" if found is None or found.origin is None else Path(found.origin).read_text("utf-8")
            tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError, ModuleNotFoundError):
            return None  # whoever imports it says what is wrong
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            call = getattr(node, "value", None)
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if attribute in names and isinstance(call, ast.Call):
                given = {word.arg: word.value for word in call.keywords}.get(keyword)
                return given.value if isinstance(given, ast.Constant) else None
        return None

    def load(self, name: str, key: str) -> Any:
        """What ``name`` stands for, imported.

        Raises:
            ConfigError: as ``check``, or the module does not define it.
        """
        self.check(name, key)
        module, _, attribute = name.partition(":")
        if not attribute:
            module, attribute = f"{self.package}.{name}", self.attribute
        try:
            return getattr(importlib.import_module(module), attribute)
        except AttributeError:
            raise ConfigError(f"{key}: module {module} does not define {attribute}") from None


OBJECTIVES = Room(package="copd_megatron.objectives", attribute="OBJECTIVE")
RECIPES = Room(package="copd_megatron.recipes", attribute="RECIPE")
EXPERIMENTS = Room(package="copd_megatron.recipes.experiments", attribute="EXPERIMENT")
