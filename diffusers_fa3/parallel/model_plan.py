"""What a plan of ours says: what diffusers is to split, and which layers attend over the parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

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
    in the order of one process. Only where a layer is given the mask of all tokens, not its part;
    an argument that is None in a call is left out."""


def split_input(dim: int, dims: int | None = None) -> ContextParallelInput:
    """Split an argument of a module; `dims` is its number of axes, others are left whole."""
    return ContextParallelInput(split_dim=dim, expected_dims=dims)


def split_output(dim: int, dims: int | None = None) -> ContextParallelInput:
    """Split an output of a module."""
    return ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=True)


def gather_output(dim: int = 1, dims: int | None = 3) -> ContextParallelOutput:
    """Gather the output of a module."""
    return ContextParallelOutput(gather_dim=dim, expected_dims=dims)
