"""A processor's functions once more, in which the names of attention lead to `calls`.

Only functions that lead to an attention call are bound anew, helpers of their module included. The
new function is the old one, globals and all, but for the names of these calls: they get a prefix,
and our functions lie under these names where the old ones lie. So everything else is the module's
own, as it is at the time of the call, and nothing that was there before is touched.

Not reached this way: attention called by a function of another module, or of a decorated one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from threading import RLock
from types import CodeType, FunctionType
from typing import Any

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
"""(where it lies, its name, the function itself, ours)"""

_lock = RLock()
_copies: dict[FunctionType, FunctionType] = {}


def bases_on_ours(cls: type) -> tuple[type, ...]:
    """The bases of a class that is `cls` with its attention calls on ours.

    In its MRO each class that has functions to bind anew comes right behind one that has just
    these. So an override stays an override, and `super()` goes the way that it went.

    Raises:
        UnsupportedModelError: a function cannot be bound anew; see `names.renamed`.
    """
    twins = {base: twin for base in cls.__mro__ if (twin := _twin(base)) is not None}
    first = [twins.pop(cls)] if cls in twins else []
    return (*first, cls, *twins.values())


@functools.cache
def _twin(cls: type) -> type | None:
    """A subclass with those functions of `cls` itself that lead to attention; None without any."""
    with _lock:
        members = {
            name: _rebind_member(member)
            for name, member in vars(cls).items()
            if name not in ("__init__", "__new__") and any(map(_leads, _functions_of(member)))
        }
    if not members:
        return None
    members |= {"__slots__": (), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls)(cls.__name__, (cls,), members)


class Helpers:
    """Functions of a class's modules through which it leads to attention.

    They are bound anew when the class is; one that is defined again, as in a notebook, is followed.
    """

    def __init__(self, taken: list[Load]) -> None:
        self._taken = taken

    @classmethod
    def of(cls, processor_class: type) -> Helpers | None:
        """Those of a class; None where there are none."""
        members = [member for base in processor_class.__mro__ for member in vars(base).values()]
        functions = [function for member in members for function in _functions_of(member)]
        taken = list(_helper_loads(functions))
        return cls(taken) if taken else None

    def follow(self) -> None:
        """Put what the names lead to now in the place of what they led to before."""
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
    """Where functions load helpers that lead to attention, and where these do."""
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
    """Whether a function calls attention, by itself or by helpers of its module.

    Linear attention does not, nor do scores and softmax written by hand.
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
    """The loads of a function and of those that are defined in it."""
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        yield from loads(code, function.__globals__)
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _ours(load: Load) -> Callable[..., Any] | None:
    """Our function in the place of an attention function, however that is imported and spelled."""
    for namespace, name, attention, ours in _ATTENTION:
        if load.value is attention or (load.namespace is namespace and load.name == name):
            return ours
    return None


def _is_helper(load: Load, function: FunctionType) -> bool:
    return isinstance(load.value, FunctionType) and load.value.__globals__ is function.__globals__


def _rebind(function: FunctionType) -> FunctionType:
    """A function that leads to attention, with names that lead to ours, which are put in place."""
    if function in _copies:
        return _copies[function]
    taken: list[Load] = []

    def new_name(load: Load) -> str | None:
        if _ours(load) is None and not (_is_helper(load, function) and _leads(load.value)):
            return None
        taken.append(load)
        return PREFIX + load.name

    code = renamed(function.__code__, function.__globals__, new_name)
    copy = _copies[function] = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    del vars(copy)["__wrapped__"]  # it is no wrapper: the signature is its own
    for load in taken:
        load.namespace[PREFIX + load.name] = _ours(load) or _rebind(load.value)
    return copy
