"""Hooks for diffusers blocks that build an S x S mask only to mark padded tokens."""

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
"""Classes of blocks that multiply their (B, S) mask by itself, in `forward` or in attention.

Chroma's pipelines pass a float mask of 0 and 1, which PyTorch's attention adds to the logits. For
such a mask, `read_mask` says "bias" without laying out S x S.
"""

ARGUMENT = "attention_mask"


def spread_masks_of(block: nn.Module) -> None:
    """Hook a block of `BLOCKS` so that it gets its mask as a `SpreadMask`; skip other modules."""
    if type(block).__name__ in BLOCKS and _spread not in block._forward_pre_hooks.values():
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
    """The position of the mask among the positional arguments."""
    _, *names = inspect.signature(forward).parameters
    return names.index(ARGUMENT)
