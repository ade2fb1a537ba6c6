"""What a callable says of itself, read once: argument names, and whether `out` is one of them.

A raw op is asked by its schema, everything else by `inspect`. Nothing is ever tried out by calling.
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
"""What kernels call the request for a log-sum-exp, the plainest first: where a function has two,
the later also returns probabilities."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of a callable."""

    names: tuple[str, ...] = ()
    """All that may be passed by name."""
    positional: tuple[str, ...] = ()
    """Those that may be passed by position, in order; positional-only ones included."""
    required: tuple[str, ...] = ()
    """Those without a default."""
    any_name: bool = False
    """`**kwargs` of which nothing says what becomes of it."""
    bound: tuple[str, ...] = ()
    """Names for which a `functools.partial` has a value already."""
    members: int | None = None
    """How many values it returns, 0 for a list; None where nothing says so."""

    @property
    def lse_switch(self) -> str | None:
        """The argument that asks for a log-sum-exp, if any."""
        return next((name for name in LSE_SWITCHES if name in self.names), None)


class ByIdentity(Generic[Facts]):
    """Something known of an object, by its identity and for as long as it lives.

    Objects need not be hashable. A bound method is made anew by each access, so it is known by its
    function.
    """

    def __init__(self, read: Callable[[Any], Facts]) -> None:
        self._read = read
        self._known: dict[tuple[int, bool], tuple[weakref.ref[Any], Facts]] = {}

    def __call__(self, thing: Any) -> Facts:
        """What is known of `thing`, read now where it is new."""
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
    """The overload that a raw op stands for: its default one, or the first."""
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
    except ValueError:  # a builtin that says nothing of itself
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
    """By its own parameters; by those of the function it wraps only where it hands names on."""
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
