"""FLUX.1: no mask of its own; a caller may pass one over [text, image]."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel

from .case import ANY_MASK, BATCH, TEXT, Case, Inputs, Layout, prompt, randn, timesteps

IMAGE = 16


def position_ids() -> Inputs:
    """Return the (tokens, 3) positions of text and of a 4 x 4 image."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    image = torch.stack([torch.zeros(IMAGE), rows.flatten(), columns.flatten()], dim=-1)
    return {"txt_ids": torch.zeros(TEXT, 3), "img_ids": image}


def joint_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return the text mask followed by the image tokens, which are all valid."""
    return torch.cat([mask, mask.new_ones(BATCH, IMAGE)], dim=1)


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 32, pads)
    kwargs = None if mask is None else {"attention_mask": joint_mask(mask)[:, None, None, :]}
    return {
        "hidden_states": randn(BATCH, IMAGE, 4),
        "encoder_hidden_states": text,
        "pooled_projections": randn(BATCH, 32, seed=2),
        "timestep": timesteps(),
        **position_ids(),
        "joint_attention_kwargs": kwargs,
    }


CASES = (
    Case(
        name="flux",
        model=FluxTransformer2DModel,
        config={
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 128,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (16, 56, 56),
        },
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
)
