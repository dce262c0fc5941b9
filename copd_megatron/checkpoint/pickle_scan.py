"""What a pickle would build, found out from its operations without building any of it.

Names are not all that can do harm. A tuple that holds the tuple before it twice, sixty times over, takes some
130 bytes, and as a key of a mapping it is hashed 2^60 times. A memo index of 2^31 makes the unpickler
allocate gigabytes. The scan keeps books of what lies on the unpickler's stack: what kind it is, how large it
is when everything shared is counted each time, and how deeply it nests.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

MAX_BYTES: Final = 128 << 20
MAX_OPERATIONS: Final = 20_000_000
"""Some 300,000 shards of tensors; the scan takes a microsecond or two for each operation."""
MAX_DEPTH: Final = 100
MAX_WHOLE: Final = 1 << 60
"""Whole numbers from here on can be chosen so that all have the same hash."""
_CHARACTERS_PER_WEIGHT = 256


class NameRefusedError(Exception):
    """A pickle asks for a name that is not allowed; the message is the name."""


class _Kind(Enum):
    text = "a text"
    whole = "a whole number"
    name = "a name"
    tuple = "a tuple"
    incomplete = "an index without content"
    """An index between its creation and its content: whatever holds it could grow unseen."""
    index = "an index"
    other = "something else"


@dataclass(slots=True)
class _Value:
    """What is known of something on the stack."""

    kind: _Kind
    weight: int = 1
    """Parts, those of its parts included, as often as they occur. What hashing it costs."""
    depth: int = 0
    text: str = ""


_OTHER = _Value(_Kind.other)
_WHOLE = _Value(_Kind.whole)
_HUGE = _Value(_Kind.other)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a pickle may hold."""

    names: Container[tuple[str, str]] | None
    """(module, name) that it may ask for. None: somebody else sees to that."""
    index: tuple[tuple[str, str], ...] = ()
    """Names of classes whose objects may be keys."""
    only_texts_and_indices: bool = True
    """As keys. Else whole numbers and tuples too."""
    max_weight: int = 1000
    """Of tuples and of index objects."""


def scan_pickle(data: bytes, rules: Rules) -> None:
    """Checks a pickle before it is loaded.

    Raises:
        NameRefusedError: it asks for a name that is not allowed.
        ValueError: it is no pickle, or would cost far more than its length; says what is wrong.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"a pickle of {len(data)} bytes, where {MAX_BYTES} is the limit")
    machine = _Machine(rules)
    for number, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if number >= MAX_OPERATIONS:
            raise ValueError(f"a pickle of more than {MAX_OPERATIONS} operations")
        try:
            act = _ACTIONS[operation.name]
        except KeyError:
            raise ValueError(f"the pickle has an operation {operation.name}, which nobody writes") from None
        act(machine, argument)


class _Machine:
    """The unpickler's stack and memo, in the form of what is known of their values."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._stack: list[_Value] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Value] = {}

    def push(self, value: _Value) -> None:
        self._stack.append(value)

    def pop(self) -> _Value:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("the pickle takes a value where there is none")
        return self._stack.pop()

    def pop_many(self, count: int) -> list[_Value]:
        return [self.pop() for _ in range(count)][::-1]

    def mark(self) -> None:
        self._marks.append(len(self._stack))
        if len(self._marks) > MAX_DEPTH:
            raise ValueError(f"the pickle nests more than {MAX_DEPTH} levels deep")

    def pop_to_mark(self) -> list[_Value]:
        if not self._marks:
            raise ValueError("the pickle goes back to a mark that is not there")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def remember(self, index: int | None) -> None:
        place = len(self._memo) if index is None else index
        if place > len(self._memo) + 1:  # picklers count, some of them from 1
            raise ValueError(f"the pickle puts value {len(self._memo)} into place {place} of its memo")
        value = self.pop()
        self.push(value)
        self._memo[place] = value

    def recall(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"the pickle takes value {index} from its memo, which is not there")
        self.push(self._memo[index])

    def whole(self, value: Any) -> None:
        small = -MAX_WHOLE < value < MAX_WHOLE
        if not small and self._rules.only_texts_and_indices:
            raise ValueError("the pickle holds a number that is no size")
        self.push(_WHOLE if small else _HUGE)

    def text(self, value: str) -> None:
        self.push(_Value(_Kind.text, 1 + len(value) // _CHARACTERS_PER_WEIGHT, text=value))

    def name(self, module: str, name: str) -> None:
        if self._rules.names is not None and (module, name) not in self._rules.names:
            raise NameRefusedError(f"{module}.{name}")
        self.push(_Value(_Kind.name, text=f"{module} {name}"))

    def name_from_stack(self) -> None:
        module, name = self.pop_many(2)
        if module.kind is not _Kind.text or name.kind is not _Kind.text:
            raise ValueError("the pickle asks for a name that is no text")
        self.name(module.text, name.text)

    def container(self, values: Sequence[_Value], kind: _Kind = _Kind.other) -> None:
        value = _Value(kind)
        self._add(value, values)
        self.push(value)

    def extend(self, values: Sequence[_Value]) -> None:
        """Puts values into the list, set or mapping that is on top of the stack."""
        target = self.pop()
        if target.kind is not _Kind.other or any(target is one for one in (_OTHER, _HUGE)):
            raise ValueError(f"the pickle puts values into {target.kind.value}")
        self._add(target, values)
        self.push(target)

    def check_keys(self, keys: Sequence[_Value]) -> None:
        allowed = {_Kind.text, _Kind.index}
        if not self._rules.only_texts_and_indices:
            allowed |= {_Kind.whole, _Kind.tuple, _Kind.name}
            allowed |= {_Kind.other} if all(key is _OTHER for key in keys) else set()
        for key in keys:
            if key.kind not in allowed:
                raise ValueError(f"a mapping in the pickle has {key.kind.value} as a key")

    def call(self) -> None:
        """A class or function from the list, with a tuple of arguments."""
        function, arguments = self.pop_many(2)
        if function.kind is not _Kind.name or arguments.kind is not _Kind.tuple:
            raise ValueError(f"the pickle calls {function.kind.value} with {arguments.kind.value}")
        if function.text == "collections OrderedDict" and arguments.weight > 1:
            raise ValueError("an ordered mapping in the pickle is not filled item by item")
        is_index = tuple(function.text.split(" ")) in self._rules.index
        complete = not is_index or arguments.weight > 1
        kind = _Kind.other if not is_index else _Kind.index if complete else _Kind.incomplete
        self.push(_Value(kind, arguments.weight, arguments.depth))

    def build(self) -> None:
        """Gives an object its content."""
        target, state = self.pop_many(2)
        if target.kind not in (_Kind.other, _Kind.incomplete) or any(
            target is one for one in (_OTHER, _HUGE)
        ):
            raise ValueError(f"the pickle changes {target.kind.value}")
        self._add(target, [state])
        if target.kind is _Kind.incomplete:
            target.kind = _Kind.index
            self._check_weight(target)
        self.push(target)

    def _add(self, target: _Value, values: Sequence[_Value]) -> None:
        for value in values:
            if value.kind is _Kind.incomplete:
                raise ValueError(f"the pickle uses {value.kind.value}")
            target.weight += value.weight
            target.depth = max(target.depth, value.depth + 1)
        if target.depth > MAX_DEPTH:
            raise ValueError(f"the pickle nests more than {MAX_DEPTH} levels deep")
        # capped, so that sharing makes no numbers of many digits
        target.weight = min(target.weight, MAX_WHOLE)
        if target.kind is _Kind.tuple:
            self._check_weight(target)

    def _check_weight(self, value: _Value) -> None:
        if value.weight > self._rules.max_weight:
            raise ValueError(f"{value.kind.value} in the pickle has more than {self._rules.max_weight} parts")


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.container(machine.pop_many(count), _Kind.tuple)


def _map_from_mark(machine: _Machine, _: Any) -> None:
    values = machine.pop_to_mark()
    machine.check_keys(values[::2])
    machine.container(values)


def _set_item(machine: _Machine, _: Any) -> None:
    key, value = machine.pop_many(2)
    machine.check_keys([key])
    machine.extend([key, value])


def _set_items(machine: _Machine, _: Any) -> None:
    values = machine.pop_to_mark()
    machine.check_keys(values[::2])
    machine.extend(values)


def _add_items(machine: _Machine, _: Any) -> None:
    values = machine.pop_to_mark()
    machine.check_keys(values)
    machine.extend(values)


def _named(machine: _Machine, argument: Any) -> None:
    module, _, name = argument.partition(" ")
    machine.name(module, name)


def _instance(machine: _Machine, argument: Any) -> None:
    _named(machine, argument)
    raise ValueError("the pickle has an operation INST, which nobody writes")


def _persistent(machine: _Machine, _: Any) -> None:
    """A tensor's storage, named by what is on the stack."""
    machine.pop()
    machine.push(_OTHER)


def _all(names: str, act: Callable[[_Machine, Any], Any]) -> dict[str, Callable[[_Machine, Any], Any]]:
    return dict.fromkeys(names.split(), act)


_ACTIONS: Final[Mapping[str, Callable[[_Machine, Any], Any]]] = {
    **_all("PROTO FRAME STOP", lambda machine, argument: None),
    **_all("MARK", lambda machine, argument: machine.mark()),
    **_all("POP", lambda machine, argument: machine.pop()),
    **_all("POP_MARK", lambda machine, argument: machine.pop_to_mark()),
    **_all("PUT BINPUT LONG_BINPUT MEMOIZE", lambda machine, argument: machine.remember(argument)),
    **_all("GET BINGET LONG_BINGET", lambda machine, argument: machine.recall(argument)),
    **_all("NONE NEWTRUE NEWFALSE FLOAT BINFLOAT", lambda machine, argument: machine.push(_OTHER)),
    **_all("BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8", lambda machine, _: machine.push(_OTHER)),
    **_all("INT BININT BININT1 BININT2 LONG LONG1 LONG4", lambda machine, value: machine.whole(value)),
    **_all("UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8", lambda machine, text: machine.text(text)),
    **_all("STRING BINSTRING SHORT_BINSTRING", lambda machine, text: machine.text(text)),
    **_all("EMPTY_LIST EMPTY_DICT EMPTY_SET", lambda machine, argument: machine.container([])),
    **_all("LIST", lambda machine, argument: machine.container(machine.pop_to_mark())),
    **_all("DICT", _map_from_mark),
    **_all("EMPTY_TUPLE", _tuple_of(0)),
    **_all("TUPLE1", _tuple_of(1)),
    **_all("TUPLE2", _tuple_of(2)),
    **_all("TUPLE3", _tuple_of(3)),
    **_all("TUPLE", lambda machine, argument: machine.container(machine.pop_to_mark(), _Kind.tuple)),
    **_all("APPEND", lambda machine, argument: machine.extend([machine.pop()])),
    **_all("APPENDS", lambda machine, argument: machine.extend(machine.pop_to_mark())),
    **_all("SETITEM", _set_item),
    **_all("SETITEMS", _set_items),
    **_all("ADDITEMS", _add_items),
    **_all("GLOBAL", _named),
    **_all("INST", _instance),
    **_all("STACK_GLOBAL", lambda machine, argument: machine.name_from_stack()),
    **_all("REDUCE NEWOBJ", lambda machine, argument: machine.call()),
    **_all("BUILD", lambda machine, argument: machine.build()),
    **_all("BINPERSID", _persistent),
}
"""What each operation does. Those that no pickler writes for such a file are left out: DUP among them."""
