"""What a processor was given: by that, a mask is recognised which it makes anew in every layer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_fa3.masks import base_of, sources_of


@dataclass(slots=True)
class Given:
    """The arguments of one run of a processor, but for activations and modules."""

    masks: list[Tensor] = field(default_factory=list)
    rest: list[object] = field(default_factory=list)
    """Names and values of all else that a mask may be made of, hashable."""

    def holds(self, sources: Iterable[Tensor]) -> bool:
        """Whether a mask of these sources is one of those that were given, or a view of it."""
        bases = {id(base_of(mask)) for mask in self.masks}
        return bases.issuperset(id(base_of(source)) for source in sources)

    def settles(self, made: Tensor) -> bool:
        """Whether a mask that the processor made says no more than what it was given.

        Additive values that differ from query to query may be a bias, of weights and activations,
        even where this layer's are all 0 (RFD4 Proteina); unless a mask of queries and keys was
        given.
        """
        if not made.is_floating_point() or made.shape[-2] == 1 or made.stride(-2) == 0:
            return True
        # Two axes alone may be samples and keys, as many as there are queries.
        return any(mask.ndim > 2 and mask.shape[-2:] == made.shape[-2:] for mask in self.masks)


def read_arguments(
    processor: object, args: Sequence[object], kwargs: Mapping[str, object]
) -> Given | None:
    """What a processor of diffusers was given; None where an argument could hide a mask."""
    if not _is_of_diffusers(processor):
        return None
    processor_class: Any = type(processor)
    names = _positional_names(processor_class)
    if len(args) > len(names):
        return None
    given = Given()
    arguments = [*zip(names, args), *kwargs.items()]
    return given if all(_sort(*argument, given) for argument in arguments) else None


def _sort(name: str, value: object, given: Given) -> bool:
    """Put an argument where it belongs; False where it could hide a mask."""
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
    # A cache of keys and values, for one: what it holds is sorted as if it were an argument.
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
