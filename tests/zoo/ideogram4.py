"""Ideogram 4: tokens see those of their own segment; one bool mask [B, 1, S, S] for all layers.

Pipelines pass [pads, text, image] with the pads as a segment of their own, -1, so pads see pads.
Here pads may lie anywhere in the text and have content. Several samples packed into one row are
blocks on the diagonal.
"""

from __future__ import annotations

import torch
from diffusers import Ideogram4Transformer2DModel
from diffusers.models.transformers.transformer_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
    SEQUENCE_PADDING_INDICATOR,
)

from .case import BATCH, TEXT, Case, Inputs, Layout, prompt, randn, timesteps

IMAGE = 16


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    assert mask is not None
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    rows_and_columns = torch.cartesian_prod(torch.tensor([0]), torch.arange(4), torch.arange(4))
    image_positions = (IMAGE_POSITION_OFFSET + rows_and_columns).expand(BATCH, IMAGE, 3)
    text_roles = torch.full((BATCH, TEXT), LLM_TOKEN_INDICATOR)
    image_roles = torch.full((BATCH, IMAGE), OUTPUT_IMAGE_INDICATOR)
    segments = torch.where(mask, 1, SEQUENCE_PADDING_INDICATOR)
    return {
        "hidden_states": randn(BATCH, TEXT + IMAGE, 4),  # read at the image only
        "timestep": timesteps(),
        "encoder_hidden_states": torch.cat([text, torch.zeros(BATCH, IMAGE, 16)], dim=1),
        "position_ids": torch.cat(
            [positions[..., None].expand(BATCH, TEXT, 3), image_positions], dim=1
        ),
        "segment_ids": torch.cat([segments, torch.ones(BATCH, IMAGE, dtype=torch.long)], dim=1),
        "indicator": torch.cat([text_roles, image_roles], dim=1),
    }


def _packed_inputs(layout: Layout, pads: float) -> Inputs:
    """Lay the samples end to end, as one row."""
    inputs = _inputs(layout, pads)
    sample = torch.arange(1, BATCH + 1)[:, None]
    segments = inputs["segment_ids"]
    apart = {
        **inputs,
        "timestep": timesteps()[:, None].expand(BATCH, TEXT + IMAGE),
        "segment_ids": torch.where(segments == SEQUENCE_PADDING_INDICATOR, segments, sample),
    }
    return {name: tensor.flatten(0, 1)[None] for name, tensor in apart.items()}


def image_rows(returned: tuple[torch.Tensor]) -> torch.Tensor:
    """Return what is predicted for the image; the text's rows are of no use to anyone."""
    return returned[0].view(BATCH, TEXT + IMAGE, -1)[:, TEXT:]


CONFIG = {
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 256,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "adaln_dim": 16,
    "llm_features_dim": 16,
}

CASES = (
    Case(
        name="ideogram4",
        model=Ideogram4Transformer2DModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=("all_true", "right", "left", "ragged", "gap"),
        pick=image_rows,
    ),
    Case(
        name="ideogram4_packed",
        model=Ideogram4Transformer2DModel,
        config=CONFIG,
        inputs=_packed_inputs,
        layouts=("all_true", "ragged"),
        pick=image_rows,
    ),
)
