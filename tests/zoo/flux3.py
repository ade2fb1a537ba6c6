"""FLUX.3: no mask. Text, image and reference image attend each to itself, then all jointly."""

from __future__ import annotations

import torch
from diffusers import Flux3Transformer2DModel
from torch import nn

from .case import BATCH, TEXT, Case, Inputs, Layout, randn
from .flux import CONFIG, joint_inputs
from .flux2 import position_ids


def open_gates(transformer: nn.Module) -> None:
    """Let the text's attention to itself count: its gates are small, as its time is always 0."""
    with torch.no_grad():
        for modulation in transformer.early_stream_modulations.values():
            modulation.linear.weight.mul_(8.0)


def _inputs(layout: Layout, pads: float) -> Inputs:
    inputs, _ = joint_inputs(layout, pads)
    return {
        **inputs,
        "txt_ids": position_ids(words=TEXT),
        "img_ids": position_ids(rows=4, columns=4),
        "image_cond_hidden_states": randn(BATCH, 4, 4, seed=2),
        "image_cond_ids": position_ids(time=10, rows=2, columns=2),
    }


CASES = (
    Case(
        name="flux3",
        model=Flux3Transformer2DModel,
        config={**CONFIG, "cond_in_channels": 4, "axes_dims_rope": (32, 32, 32, 32)},
        inputs=_inputs,
        prepare=open_gates,
    ),
)
