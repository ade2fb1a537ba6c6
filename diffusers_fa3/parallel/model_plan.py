"""What a plan of ours says: what diffusers is to split, and which layers attend over the parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from diffusers_fa3.errors import UnsupportedModelError

CPPlan = dict[str, Any]
"""What `enable_parallelism(cp_plan=...)` takes: module names, and what to split or gather there."""


@dataclass(frozen=True)
class ModelPlan:
    """How one class of models is split."""

    make: Callable[[Any], CPPlan]
    """The plan of a model of this class."""
    split: str = ""
    """The layers that attend over split tokens: a regular expression that matches their names in
    the model. Diffusers' processors can tell by themselves where they have a `_parallel_config`;
    those that call PyTorch's attention have none."""
    local: str = ""
    """Likewise, the layers whose keys every rank has: they need nothing of other ranks."""
    order: tuple[str, ...] = ()
    """Arguments of a processor, (B, S, ...), of which the sequence of a mask of all tokens is made,
    in the order of one process. Only where a layer is given the mask of all tokens, not its part.
    A layer that lacks some of them, since it is given text and image as one, takes the order from
    an earlier layer of the forward that was given the same mask."""
    whole_first: str = ""
    """An argument of a processor, (S, ...) or (B, S, ...), that every rank has whole, where split
    calls have its tokens as their first keys. A call that has no other keys is local."""
    trains: bool = True
    """Whether the gradients of parameters, summed over ranks, are those of one process. They are
    not where tokens are gathered in front of other layers: diffusers' gather passes no gradients
    on to other ranks, and what comes behind it counts once for each rank."""


def refuse(model: Any, why: str) -> NoReturn:
    """Raise UnsupportedModelError for a model of a class that has a plan."""
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be split over ranks with this configuration: {why}. "
        "Run it on one GPU"
    )


def split_input(dim: int, dims: int | None = None) -> ContextParallelInput:
    """Split an argument of a module; `dims` is its number of axes, others are left whole."""
    return ContextParallelInput(split_dim=dim, expected_dims=dims)


def split_output(dim: int, dims: int | None = None) -> ContextParallelInput:
    """Split an output of a module."""
    return ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=True)


def gather_output(dim: int = 1, dims: int | None = 3) -> ContextParallelOutput:
    """Gather the output of a module."""
    return ContextParallelOutput(gather_dim=dim, expected_dims=dims)
