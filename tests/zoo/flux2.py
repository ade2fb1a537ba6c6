"""FLUX.2: no mask of its own; a caller may pass one over [text, image], as with FLUX.1."""

from __future__ import annotations

import torch
from diffusers import Flux2Transformer2DModel

from .case import ANY_MASK, TEXT, Case, Inputs, Layout, timesteps
from .flux import CONFIG as FLUX_CONFIG
from .flux import joint_inputs, mask_kwargs


def position_ids(*, time: int = 0, rows: int = 1, columns: int = 1, words: int = 1) -> torch.Tensor:
    """Return the (tokens, 4) positions of an image or a text."""
    return torch.cartesian_prod(
        torch.tensor([time]), torch.arange(rows), torch.arange(columns), torch.arange(words)
    )


def inputs(layout: Layout, pads: float) -> Inputs:
    given, mask = joint_inputs(layout, pads)
    return {
        **given,
        "txt_ids": position_ids(words=TEXT),
        "img_ids": position_ids(rows=4, columns=4),
        "guidance": timesteps(),
        "joint_attention_kwargs": mask_kwargs(mask),
    }


CONFIG = {**FLUX_CONFIG, "axes_dims_rope": (32, 32, 32, 32)}

CASES = (
    Case(
        name="flux2",
        model=Flux2Transformer2DModel,
        config=CONFIG,
        inputs=inputs,
        layouts=ANY_MASK,
    ),
)
