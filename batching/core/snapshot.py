"""A scheduler as JSON and back, exactly: what it holds between two calls, whatever its classes are.

Values are written as themselves or as [kind, …]; an object of our own is written where it is first
met and named by its number afterwards (in the order in which they are complete), since a sequence
is known to the queue, the residents and the drafts alike. None holds itself. The pool, which is
nearly all there is, is left to the encoder as it is: a million tokens are no work in C.

Reading makes objects of the classes below and fills their attributes: a log from a stranger can be
wrong, but runs nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from enum import Enum
from types import FunctionType, NoneType
from typing import Any

import msgspec

from batching.core import types
from batching.core.admission import OutputForecast
from batching.core.blocks import BlockPool, Key
from batching.core.cost_model import CostModel
from batching.core.draft import Draft
from batching.core.policy import POLICIES, WaitingQueue
from batching.core.residents import Residents
from batching.core.scheduler import Scheduler
from batching.core.sequence import Sequence
from batching.core.totals import Totals

_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        CostModel, Draft, OutputForecast, Residents, Scheduler, Sequence, WaitingQueue, Totals,
    )
}  # fmt: skip
_VALUES: dict[str, type] = {
    name: cls
    for name, cls in vars(types).items()
    if isinstance(cls, type) and issubclass(cls, msgspec.Struct | Enum)
}
_COLLECTIONS: dict[str, type] = {cls.__name__: cls for cls in (list, tuple, deque, set, frozenset)}
_PLAIN = frozenset({NoneType, bool, int, str})


def freeze(scheduler: Scheduler) -> Any:
    """All of a scheduler, to be encoded before it changes.

    Raises `TypeError` for what it cannot write.
    """
    return _Freezer().freeze(scheduler)


def thaw(state: Any) -> Scheduler:
    """A scheduler that goes on where the frozen one stood.

    Raises:
        ValueError: this is no scheduler's state, or that of another version.
    """
    try:
        scheduler = _Thawer().thaw(state)
    except Exception as error:  # whatever it may hold instead
        raise ValueError(f"not a scheduler's state: {error!r}") from error
    if type(scheduler) is not Scheduler:
        raise ValueError("not a scheduler's state")
    return scheduler


class _Freezer:
    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # by id: all live as long as the scheduler

    def freeze(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is float:
            return value if math.isfinite(value) else ["float", str(value)]
        if kind is bytes:
            return ["bytes", value.hex()]
        if kind is dict:
            return ["dict", [[self.freeze(k), self.freeze(v)] for k, v in value.items()]]
        if kind.__name__ in _COLLECTIONS:
            if _PLAIN.issuperset(map(type, value)):
                return [kind.__name__, list(value)]
            return [kind.__name__, [self.freeze(v) for v in value]]
        if kind is FunctionType:
            return ["policy", next(name for name, f in POLICIES.items() if f is value)]
        if kind is BlockPool:  # its index of the keys is made again
            return ["BlockPool", {k: v for k, v in vars(value).items() if k != "_cached"}]
        if kind in _VALUES.values():
            return [kind.__name__, value]
        # A recording scheduler is one that has a recorder besides.
        name = "Scheduler" if isinstance(value, Scheduler) else kind.__name__
        if name not in _CLASSES:
            raise TypeError(f"{name} has no place in a snapshot")
        if id(value) in self._numbers:
            return ["again", self._numbers[id(value)]]
        written = {k: self.freeze(v) for k, v in _attributes(value)}
        self._numbers[id(value)] = len(self._numbers)
        return [name, written]


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Scheduler):
        yield from ((k, v) for k, v in vars(value).items() if k != "_recorder")
    elif hasattr(value, "__dict__"):
        yield from vars(value).items()
    else:
        yield from ((k, getattr(value, k)) for k in type(value).__slots__ if hasattr(value, k))


class _Thawer:
    def __init__(self) -> None:
        self._objects: list[Any] = []

    def thaw(self, value: Any) -> Any:
        if type(value) is not list:
            return value
        kind, content = value
        if kind in _COLLECTIONS:
            is_plain = list not in set(map(type, content))
            return _COLLECTIONS[kind](content if is_plain else map(self.thaw, content))
        if kind == "dict":
            return {self.thaw(k): self.thaw(v) for k, v in content}
        if kind == "again":
            return self._objects[content]
        if kind in _VALUES:
            return msgspec.convert(content, _VALUES[kind])
        if kind == "BlockPool":
            pool = BlockPool(content["num_blocks"], content["block_size"])
            vars(pool).update(content, _keys=msgspec.convert(content["_keys"], list[Key | None]))
            pool._cached = {key: b for b, key in enumerate(pool._keys) if key is not None}
            return pool
        if kind in _CLASSES:
            cls = _CLASSES[kind]
            made: Any = object.__new__(cls)
            for name, attribute in content.items():
                setattr(made, name, self.thaw(attribute))
            self._objects.append(made)
            return made
        match kind:
            case "float":
                return float(content)
            case "bytes":
                return bytes.fromhex(content)
            case "policy":
                return POLICIES[content]
        raise ValueError(f"unknown kind {kind!r}")
