"""A processor's class once more, in which its attention call leads to `calls.py`.

Functions find what they call in the globals of their module. Here they are bound to a copy of
those globals, in which the two attention functions are ours: nothing is patched, the original class
and its module stay as they are, and no call costs more than before. The copy is of the moment when
the first processor of a module is switched; what someone patches into the module later is not seen.

What is not reached this way: functions of other modules that call attention, and decorated ones.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch.nn import functional as F

from diffusers_fa3.layers import calls

_REPLACED: dict[int, Any] = {
    id(F.scaled_dot_product_attention): calls.scaled_dot_product_attention,
    id(dispatch_attention_fn): calls.dispatch_attention_fn,
}
_functional = types.ModuleType(F.__name__)
_functional.__dict__.update(
    vars(F), scaled_dot_product_attention=calls.scaled_dot_product_attention
)
_REPLACED[id(F)] = _functional

_KEPT = frozenset(torch.nn.Module.__mro__)
"""Classes that call no attention."""


@functools.cache
def rebound(cls: type) -> type:
    """A class with the functions of `cls` and its bases, rebound; to stand before `cls` in an MRO.

    One class for each base, in the order of `cls.__mro__`, so that `super()` goes the same way.
    """
    originals = [base for base in cls.__mro__ if base not in _KEPT]
    bases: tuple[type, ...] = ()
    for original in reversed(originals):
        owner = types.CellType()
        members = {
            name: _rebind_member(member, owner if bases else None)
            for name, member in vars(original).items()
            if name != "__init__" and _functions_of(member)
        }
        twin = type(original)(original.__name__, bases, {"__slots__": (), **members})
        owner.cell_contents = twin
        bases = (twin,)
    return bases[0]


@functools.cache
def calls_attention(cls: type) -> bool:
    """Whether anything that `cls` runs calls one of the two attention functions.

    Linear attention does not, nor do scores and softmax written by hand.
    """
    members = (
        member for base in cls.__mro__ if base not in _KEPT for member in vars(base).values()
    )
    waiting = [function for member in members for function in _functions_of(member)]
    seen: set[int] = set()
    while waiting:
        function = waiting.pop()
        seen.add(id(function))
        used = [function.__globals__.get(name) for name in function.__code__.co_names]
        if any(id(value) in _REPLACED and value is not F for value in used):
            return True
        if F in used and F.scaled_dot_product_attention.__name__ in function.__code__.co_names:
            return True
        waiting += [
            value
            for value in used
            if isinstance(value, types.FunctionType)
            and value.__globals__ is function.__globals__
            and id(value) not in seen
        ]
    return False


def _functions_of(member: object) -> list[types.FunctionType]:
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    candidates = (
        (member.fget, member.fset, member.fdel) if isinstance(member, property) else (member,)
    )
    return [found for found in candidates if isinstance(found, types.FunctionType)]


def _rebind_member(member: Any, owner: types.CellType | None) -> Any:
    if isinstance(member, staticmethod | classmethod):
        return type(member)(_rebind_member(member.__func__, owner))
    if isinstance(member, property):
        parts = (member.fget, member.fset, member.fdel)
        return property(*(part and _rebind_member(part, owner) for part in parts))
    if isinstance(member, types.FunctionType):
        return _rebind(member, _rebound_globals(member), owner)
    return member


def _rebind(
    function: types.FunctionType, namespace: dict[str, Any], owner: types.CellType | None = None
) -> Callable[..., Any]:
    """`function` in other globals; `owner` is the class that its `super()` starts from."""
    closure = function.__closure__
    if closure is not None and owner is not None:
        closure = tuple(
            owner if name == "__class__" else cell
            for name, cell in zip(function.__code__.co_freevars, closure)
        )
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, closure
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    del copy.__wrapped__  # type: ignore[attr-defined]  # it is no wrapper: the signature is its own
    return copy


_copies: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}


def _rebound_globals(function: types.FunctionType) -> dict[str, Any]:
    """The globals of a function's module with our attention; one copy for each module."""
    original = function.__globals__
    if id(original) in _copies:
        return _copies[id(original)][1]
    # By `__name__`, Dynamo would resolve names in the original module.
    copy = {name: value for name, value in original.items() if name != "__name__"}
    for name, value in copy.items():
        if id(value) in _REPLACED:
            copy[name] = _REPLACED[id(value)]
        elif isinstance(value, types.FunctionType) and value.__globals__ is original:
            copy[name] = _rebind(value, copy)
    _copies[id(original)] = (original, copy)  # only now: another thread must not run a half of it
    return copy
