"""A processor's arguments, by which a mask that it rebuilds in every layer is recognised."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_fa3.masks import memory_of, sources_of


@dataclass(slots=True)
class Given:
    """The arguments of one run of a processor, without activations and modules."""

    masks: list[Tensor] = field(default_factory=list)
    rest: list[object] = field(default_factory=list)
    """Names and values, hashable, of all other arguments that a mask may be made of."""

    def holds(self, sources: Iterable[Tensor]) -> bool:
        """Whether the mask that has these sources is one of the given masks, or a view of one."""
        given = {memory_of(mask) for mask in self.masks}
        return given.issuperset(map(memory_of, sources))

    def settles(self, made: Tensor) -> bool:
        """Whether a mask that the processor made follows from the given arguments alone.

        An additive mask with a row for each query may be a bias, computed from weights and
        activations, even if it is all 0 in this layer (RFD4 Proteina). It counts as settled only
        if a given mask has the same (Sq, Sk) axes.
        """
        if not made.is_floating_point() or made.shape[-2] == 1 or made.stride(-2) == 0:
            return True
        # A given 2-D mask does not count: it may be (B, Sk) with B = Sq.
        return any(mask.ndim > 2 and mask.shape[-2:] == made.shape[-2:] for mask in self.masks)


def read_arguments(
    processor: object, args: Sequence[object], kwargs: Mapping[str, object]
) -> Given | None:
    """The arguments of a diffusers processor, sorted.

    None if an argument could hide a mask, and for processors that are not from diffusers.
    """
    if not _is_of_diffusers(processor):
        return None
    processor_class: Any = type(processor)
    names = _positional_names(processor_class)
    if len(args) > len(names):
        return None
    given = Given()
    arguments = [*zip(names, args), *kwargs.items()]
    return given if all(_sort(*argument, given) for argument in arguments) else None


def arguments_of(
    processor: object, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, Any]:
    """A processor's arguments by name, without those beyond its signature."""
    processor_class: Any = type(processor)
    return {**dict(zip(_positional_names(processor_class), args)), **kwargs}


def _sort(name: str, value: object, given: Given) -> bool:
    """Store an argument in `given`; False if the argument could hide a mask."""
    if isinstance(value, Tensor):
        if "mask" in name or not (value.is_floating_point() or value.is_complex()):
            given.masks.extend(sources_of(value))
        return True
    if isinstance(value, tuple | list):
        return all(_sort(name, item, given) for item in value)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        given.rest.append((name, value))
        return True
    if isinstance(value, slice):
        given.rest.append((name, value.start, value.stop, value.step))
        return True
    if isinstance(value, nn.Module):
        return True
    # For example a cache of keys and values: its attributes are sorted like arguments.
    return _holds_values(value) and all(
        not _holds_values(item) and _sort(held, item, given) for held, item in vars(value).items()
    )


def _holds_values(value: object) -> bool:
    plain = not isinstance(value, nn.Module)
    return plain and _is_of_diffusers(value) and hasattr(value, "__dict__")


def _is_of_diffusers(value: object) -> bool:
    return type(value).__module__.startswith("diffusers.")


@functools.cache
def _positional_names(processor_class: type) -> tuple[str, ...]:
    _, *parameters = inspect.signature(processor_class.__call__).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
