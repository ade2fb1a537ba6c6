"""Qwen-Image 2.1: text, an image within it and the target image in one block-causal sequence.

A prefill makes one call per segment, over the keys up to its end: bool masks that are causal within
a text, `[ones | tril]`, and hide its pads; of images only the latter. A query before the first
valid key sees nothing. A decode attends from the target image to the cached prefix and itself,
[B, 1, 1, S]. The processor for flex_attention prefills by one BlockMask and decodes like the other.
"""

from __future__ import annotations

import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21FlexAttnProcessor,
    QwenImage21KVCache,
)
from torch import nn

from .case import ANY_MASK, BATCH, TEXT, Case, Inputs, Layout, prompt, randn, timesteps

HEADS, HEAD_DIM, LAYERS = 2, 128, 2
TARGET = 16
# A slot stands for 2x2 tokens: one is within the text, those of the target image are behind it.
IS_SLOT = torch.tensor([False] * 5 + [True] + [False] * (TEXT - 6) + [True] * (TARGET // 4))
TOKENS = torch.where(IS_SLOT, 4, 1)
PREFIX = int(TOKENS.sum()) - TARGET


class Prefill(QwenImage21Transformer2DModel):
    """Returns the rows of the prefix as well, without which nobody would see its last calls."""

    def forward(self, valid_rows: torch.Tensor, **inputs: object) -> tuple[torch.Tensor]:
        """Zero the rows of padded tokens, whose content is not that of any token."""
        (rows,) = super().forward(**inputs)
        return (rows * valid_rows[..., None],)


class Extract(Prefill):
    """The first step of a run with caches, which every layer fills."""

    def forward(self, valid_rows: torch.Tensor, **inputs: object) -> tuple[torch.Tensor]:
        """As `Prefill`."""
        cache = QwenImage21KVCache(LAYERS)
        return super().forward(valid_rows, kv_cache=cache, kv_cache_mode="extract", **inputs)


class Decode(QwenImage21Transformer2DModel):
    """Takes the keys and values of the prefix from its caller, not from an earlier step."""

    def forward(self, prefix: torch.Tensor, **inputs: object) -> tuple[torch.Tensor]:
        """`prefix` is (layers, 2, B, S, H, D)."""
        cache = QwenImage21KVCache(len(prefix))
        for layer, (keys, values) in zip(cache.layer_caches, prefix):
            layer.store(keys, values)
        return super().forward(kv_cache=cache, kv_cache_mode="cached", **inputs)


def use_flex(model: nn.Module) -> None:
    """Set the processor that a compiled model is meant to have."""
    model.set_attn_processor(QwenImage21FlexAttnProcessor())


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    valid = IS_SLOT.expand(BATCH, -1).clone()
    valid[:, :TEXT] |= True if mask is None else mask
    return {
        "hidden_states": randn(BATCH, 4 + TARGET, 4),
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": mask,
        "timestep": timesteps(),
        "img_shapes": [[(1, 2, 2), (1, 4, 4)]] * BATCH,
        "img_mask": IS_SLOT.expand(BATCH, -1),
        "valid_rows": valid.repeat_interleave(TOKENS, dim=1),
    }


def _decode_inputs(layout: Layout, pads: float) -> Inputs:
    inputs = _inputs(layout, pads)
    valid = inputs.pop("valid_rows")[:, :PREFIX, None, None]
    prefix = randn(LAYERS, 2, BATCH, PREFIX, HEADS, HEAD_DIM)
    return {**inputs, "prefix": prefix + pads * ~valid}


CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": LAYERS,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "context_in_dim": 16,
}

CASES = (
    Case(
        name="qwenimage21",
        model=Prefill,
        config=CONFIG,
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
    Case(
        name="qwenimage21_extract",
        model=Extract,
        config=CONFIG,
        inputs=_inputs,
        layouts=("none", "ragged"),
    ),
    Case(
        name="qwenimage21_decode",
        model=Decode,
        config=CONFIG,
        inputs=_decode_inputs,
        layouts=("none", "ragged"),
    ),
    Case(
        name="qwenimage21_flex",
        model=Prefill,
        config=CONFIG,
        inputs=_inputs,
        layouts=("ragged",),
        prepare=use_flex,
        unreached="the mask is a BlockMask and the call is pinned to flex_attention",
    ),
    Case(
        name="qwenimage21_flex_decode",
        model=Decode,
        config=CONFIG,
        inputs=_decode_inputs,
        layouts=("ragged",),
        prepare=use_flex,
    ),
)
