"""The arguments of a callable, read once: their names, and whether `out` is one of them.

Raw ops are read from their schema, all other callables by `inspect`. No callable is called to find
out.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Generic, TypeVar

import torch

Facts = TypeVar("Facts")

LSE_SWITCHES = ("return_lse", "return_softmax_lse", "return_attn_probs")
"""The names that kernels have for the argument that asks for the log-sum-exp, by preference: if a
function has two of these arguments, the later one also returns probabilities."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of a callable."""

    names: tuple[str, ...] = ()
    """Arguments that may be passed by name."""
    positional: tuple[str, ...] = ()
    """Arguments that may be passed by position, in order; includes positional-only arguments."""
    required: tuple[str, ...] = ()
    """Arguments without a default."""
    any_name: bool = False
    """Whether the callable takes `**kwargs`, with no hint of the names that it accepts."""
    bound: tuple[str, ...] = ()
    """Arguments that a `functools.partial` gives by name."""
    members: int | None = None
    """The number of values that the callable returns, 0 for a list; None if unknown."""

    @property
    def lse_switch(self) -> str | None:
        """The argument that asks for the log-sum-exp, or None."""
        return next((name for name in LSE_SWITCHES if name in self.names), None)


class ByIdentity(Generic[Facts]):
    """A cache of facts about objects, by identity, each for as long as its object lives.

    Objects need not be hashable. Python makes a new bound method at each access, so bound methods
    are cached by their function.
    """

    def __init__(self, read: Callable[[Any], Facts]) -> None:
        self._read = read
        self._known: dict[tuple[int, bool], tuple[weakref.ref[Any], Facts]] = {}

    def __call__(self, thing: Any) -> Facts:
        """The facts about `thing`, read now if they are not cached."""
        known_by = thing.__func__ if isinstance(thing, MethodType) else thing
        key = (id(known_by), known_by is thing)
        known = self._known.get(key)
        if known is not None and known[0]() is known_by:
            return known[1]
        facts = self._read(thing)
        if type(known_by).__weakrefoffset__:
            self._known[key] = (weakref.ref(known_by, lambda _: self._known.pop(key, None)), facts)
        return facts


def is_raw_op(kernel: object) -> bool:
    """Whether `kernel` is a `torch.ops` packet or one of its overloads."""
    return isinstance(kernel, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))


def overload(op: Any) -> Any:
    """The overload of a raw op to use: `op` itself if it is one, else its default or first one."""
    if isinstance(op, torch._ops.OpOverload):
        return op
    overloads = op.overloads()
    return getattr(op, "default" if "default" in overloads else overloads[0])


def _read_signature(kernel: Any) -> Signature:
    if isinstance(kernel, functools.partial):
        return _of_partial(kernel)
    if is_raw_op(kernel):
        return _of_schema(overload(kernel)._schema)
    try:
        return _of_function(kernel)
    except ValueError:  # a builtin without a signature
        return Signature()


def _of_schema(schema: Any) -> Signature:
    arguments = schema.arguments
    returns = schema.returns
    a_list = len(returns) == 1 and returns[0].type.kind() == "ListType"
    return Signature(
        names=tuple(a.name for a in arguments),
        positional=tuple(a.name for a in arguments if not a.kwarg_only),
        required=tuple(a.name for a in arguments if not a.has_default_value()),
        members=0 if a_list else len(returns),
    )


def _of_partial(kernel: functools.partial[Any]) -> Signature:
    whole = read_signature(kernel.func)
    taken = {*whole.positional[: len(kernel.args)]}
    given = taken | kernel.keywords.keys()
    return replace(
        whole,
        names=tuple(name for name in whole.names if name not in taken),
        positional=whole.positional[len(kernel.args) :],
        required=tuple(name for name in whole.required if name not in given),
        bound=(*whole.bound, *kernel.keywords),
    )


def _of_function(function: Any) -> Signature:
    """From its own parameters; if it wraps a function and takes `**kwargs`, from both."""
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    kinds = {p.kind for p in parameters}
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    own = Signature(
        names=tuple(p.name for p in named),
        positional=tuple(p.name for p in by_position),
        required=tuple(
            p.name for p in parameters if p.default is p.empty and (p in by_position or p in named)
        ),
        any_name=inspect.Parameter.VAR_KEYWORD in kinds,
    )
    inner = getattr(function, "__wrapped__", None)
    if inner is None or not own.any_name:
        return own
    if isinstance(function, MethodType):
        inner = MethodType(inner, function.__self__)
    wrapped = read_signature(inner)
    hands_on_positions = inspect.Parameter.VAR_POSITIONAL in kinds and not own.positional
    return replace(
        wrapped,
        names=tuple(dict.fromkeys((*own.names, *wrapped.names))),
        positional=wrapped.positional if hands_on_positions else own.positional,
        required=tuple(dict.fromkeys((*own.required, *wrapped.required))),
    )


read_signature: ByIdentity[Signature] = ByIdentity(_read_signature)
