"""Hooks on the blocks of diffusers that lay out S x S only to say which tokens are padding."""

from __future__ import annotations

import inspect
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
"""Classes of diffusers whose forward, or whose attention, multiplies its (B, S) mask by itself.

Chroma's pipelines pass it 0 and 1 as floats, which PyTorch's attention adds to the logits. That too
is told from the factors.
"""

ARGUMENT = "attention_mask"


def spread_masks_of(block: nn.Module) -> None:
    """Have a block of `BLOCKS` be given its mask as a `SpreadMask`; leave any other module."""
    if type(block).__name__ in BLOCKS and _spread not in block._forward_pre_hooks.values():
        block.register_forward_pre_hook(_spread, with_kwargs=True)


def lay_out_masks_of(block: nn.Module) -> None:
    """Undo `spread_masks_of`."""
    for key, hook in list(block._forward_pre_hooks.items()):
        if hook is _spread:
            del block._forward_pre_hooks[key]
            del block._forward_pre_hooks_with_kwargs[key]


def _spread(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if torch.compiler.is_compiling():
        return None
    place = _place(type(block).forward)
    given = kwargs[ARGUMENT] if ARGUMENT in kwargs else (*args, None)[min(place, len(args))]
    if type(given) is not Tensor or given.ndim != 2 or not can_be_spread(given):
        return None
    spread = given.as_subclass(SpreadMask)
    if ARGUMENT in kwargs:
        return args, {**kwargs, ARGUMENT: spread}
    return (*args[:place], spread, *args[place + 1 :]), kwargs


@cache
def _place(forward: Callable[..., Any]) -> int:
    """Where the mask stands among the arguments by position."""
    _, *names = inspect.signature(forward).parameters
    return names.index(ARGUMENT)
