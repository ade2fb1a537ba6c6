"""Hooks for diffusers blocks that build an S x S mask only to mark padded tokens."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_fa3.masks import SpreadMask, can_be_spread

BLOCKS = (
    "ChromaSingleTransformerBlock",
    "ChromaTransformerBlock",
    "HunyuanVideo15TransformerBlock",
)
"""Classes of blocks that multiply their (B, S) mask by itself, in `forward` or in attention.

Chroma's pipelines pass a float mask of 0 and 1, which PyTorch's attention adds to the logits. For
such a mask, `read_mask` says "bias" without laying out S x S.
"""

ARGUMENT = "attention_mask"


def class_in_diffusers(module: nn.Module) -> str:
    """The name of the class in diffusers that a module is of; empty if it is of none.

    The module may be of a subclass: a user's own, or one that FSDP made.
    """
    mro = (base for base in type(module).__mro__ if issubclass(base, nn.Module))
    return next((base.__name__ for base in mro if base.__module__.startswith("diffusers.")), "")


def spread_masks_of(block: nn.Module) -> None:
    """Hook a block of `BLOCKS` so that it gets its mask as a `SpreadMask`; skip other modules."""
    if class_in_diffusers(block) in BLOCKS and _spread not in block._forward_pre_hooks.values():
        block.register_forward_pre_hook(_spread, with_kwargs=True)


def lay_out_masks_of(block: nn.Module) -> None:
    """Remove the hook of `spread_masks_of`."""
    for key, hook in list(block._forward_pre_hooks.items()):
        if hook is _spread:
            del block._forward_pre_hooks[key]
            del block._forward_pre_hooks_with_kwargs[key]


def _spread(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if torch.compiler.is_compiling():
        return None
    block_class: Any = type(block)
    place = _place(block_class)
    given = kwargs[ARGUMENT] if ARGUMENT in kwargs else next(iter(args[place:]), None)
    if type(given) is not Tensor or given.ndim != 2 or not can_be_spread(given):
        return None
    spread = given.as_subclass(SpreadMask)
    if ARGUMENT in kwargs:
        return args, {**kwargs, ARGUMENT: spread}
    return (*args[:place], spread, *args[place + 1 :]), kwargs


@cache
def _place(block_class: type) -> int:
    """The position of the mask among the positional arguments; behind them if none is named so.

    A `forward` that names no arguments hands them on to the class behind it.
    """
    forwards = (vars(base)["forward"] for base in block_class.__mro__ if "forward" in vars(base))
    names = next(filter(None, map(_positional_names, forwards)))
    return names.index(ARGUMENT) if ARGUMENT in names else sys.maxsize


def _positional_names(forward: Callable[..., Any]) -> list[str]:
    _, *parameters = inspect.signature(forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
