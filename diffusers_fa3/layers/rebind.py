"""Copies of a processor's functions whose attention calls lead to `calls`.

Only functions that lead to an attention call are copied, including helper functions of the same
module. A copy shares the globals of the original. Its code differs only in the names of attention
functions and helpers, which get the prefix `_fa3_`. The prefixed names are added beside the old
names, and lead to our functions and to the copied helpers. So a copy sees all other globals as they
are at the time of the call, and no existing name is changed.

Not reached: attention called by a function of another module, or by a decorated function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from threading import RLock
from types import CodeType, FunctionType
from typing import Any, cast

from diffusers.models import attention_dispatch
from torch.nn import functional as F

from diffusers_fa3.layers import calls
from diffusers_fa3.layers.names import Load, loads, renamed

PREFIX = "_fa3_"

_ATTENTION = tuple(
    (vars(module), ours.__name__, getattr(module, ours.__name__), ours)
    for module, ours in (
        (F, calls.scaled_dot_product_attention),
        (attention_dispatch, calls.dispatch_attention_fn),
    )
)
"""(namespace of the original, its name, the original, our function)"""

COPY = "_fa3_copy"
"""Attribute of a function, or of a class, that holds it and its copy. A table of ours would keep
both alive, and with them everything that they close over: a model, if the class is made in a
function. Attributes are copied between objects at times, so the attribute says whose copy it is."""

_lock = RLock()


def bases_on_ours(cls: type) -> tuple[type, ...]:
    """Bases for a class that does what `cls` does, with attention calls that lead to ours.

    In the MRO, each class that has functions to copy comes right after a subclass that has only the
    copies. So an override stays an override, and `super()` goes through the same classes.

    Raises:
        UnsupportedModelError: a function cannot be copied; see `names.renamed`.
    """
    twins = {base: twin for base in cls.__mro__ if (twin := _twin(base)) is not None}
    first = [twins.pop(cls)] if cls in twins else []
    return (*first, cls, *twins.values())


def _twin(cls: type) -> type | None:
    """A subclass with copies of `cls`'s own functions that lead to attention; None if none do."""
    with _lock:
        original, twin = vars(cls).get(COPY, (None, None))
        if original is cls:
            return cast(type, twin)
        members = {
            name: _rebind_member(member)
            for name, member in vars(cls).items()
            if name not in ("__init__", "__new__") and any(map(_leads, _functions_of(member)))
        }
        if not members:
            return None
        names = {"__slots__": (), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        made: type = type(cls)(cls.__name__, (cls,), members | names)
        setattr(cls, COPY, (cls, made))
        return made


class Helpers:
    """The helper functions through which a processor class leads to attention.

    They are copied when the class is wrapped. If a helper is defined again later, as in a notebook,
    `follow` copies the new function.
    """

    def __init__(self, taken: list[Load]) -> None:
        self._taken = taken

    @classmethod
    def of(cls, processor_class: type) -> Helpers | None:
        """The helpers of a class; None if it has none."""
        members = [member for base in processor_class.__mro__ for member in vars(base).values()]
        functions = [function for member in members for function in _functions_of(member)]
        taken = list(_helper_loads(functions))
        return cls(taken) if taken else None

    def follow(self) -> None:
        """Update the prefixed name of each helper whose own name leads to a new object."""
        for i, load in enumerate(self._taken):
            now: Any = load.namespace.get(load.name)
            if now is load.value:
                continue
            leads = isinstance(now, FunctionType) and _leads(now)
            with _lock:
                load.namespace[PREFIX + load.name] = _rebind(now) if leads else now
            self._taken[i] = Load(load.offset, load.name, load.namespace, now)
            self._taken += _helper_loads([now] if leads else [])


def _helper_loads(functions: Iterable[FunctionType]) -> Iterator[Load]:
    """The loads of helpers that lead to attention, in `functions` and in these helpers."""
    waiting, seen = list(functions), set[object]()
    while waiting:
        function = waiting.pop()
        for load in _all_loads(function):
            if _is_helper(load, function) and load.value not in seen and _leads(load.value):
                seen.add(load.value)
                waiting.append(load.value)
                yield load


def _functions_of(member: object) -> list[FunctionType]:
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    candidates = (
        (member.fget, member.fset, member.fdel) if isinstance(member, property) else (member,)
    )
    return [found for found in candidates if isinstance(found, FunctionType)]


def _rebind_member(member: Any) -> Any:
    if isinstance(member, staticmethod | classmethod):
        return type(member)(_rebind_member(member.__func__))
    if isinstance(member, property):
        return property(*map(_rebind_member, (member.fget, member.fset, member.fdel)))
    return _rebind(member) if isinstance(member, FunctionType) and _leads(member) else member


def _leads(function: FunctionType) -> bool:
    """Whether a function calls attention, itself or through helpers of its module.

    Linear attention does not count, nor do scores and softmax written by hand.
    """
    waiting, seen = [function], {function}
    while waiting:
        for load in _all_loads(waiting.pop()):
            if _ours(load) is not None:
                return True
            if _is_helper(load, function) and load.value not in seen:
                seen.add(load.value)
                waiting.append(load.value)
    return False


def _all_loads(function: FunctionType) -> Iterator[Load]:
    """The loads of a function, and of the functions defined in it."""
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        yield from loads(code, function.__globals__)
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _ours(load: Load) -> Callable[..., Any] | None:
    """Our function, if the load gives an attention function, however imported or spelled."""
    for namespace, name, attention, ours in _ATTENTION:
        if load.value is attention or (load.namespace is namespace and load.name == name):
            return ours
    return None


def _is_helper(load: Load, function: FunctionType) -> bool:
    return isinstance(load.value, FunctionType) and load.value.__globals__ is function.__globals__


def _rebind(function: FunctionType) -> FunctionType:
    """Copy a function that leads to attention, and add what the prefixed names lead to."""
    original, known = vars(function).get(COPY, (None, None))
    if original is function:
        return cast(FunctionType, known)
    taken: list[Load] = []

    def new_name(load: Load) -> str | None:
        if _ours(load) is None and not (_is_helper(load, function) and _leads(load.value)):
            return None
        taken.append(load)
        return PREFIX + load.name

    code = renamed(function.__code__, function.__globals__, new_name)
    copy = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    vars(function)[COPY] = (function, copy)
    del vars(copy)["__wrapped__"]  # a copy is no wrapper: it has its own signature
    for load in taken:
        load.namespace[PREFIX + load.name] = _ours(load) or _rebind(load.value)
    return copy
