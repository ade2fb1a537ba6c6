"""Bria: 3.2 drops every mask on its way to the blocks; FIBO masks text.

FIBO's blocks are those of FLUX.1, and its mask over [text, pads, image] is the caller's: one row
of bool per sample, or, in pipelines up to diffusers 0.40, outer(valid, valid) as 0 and -inf.
"""

from __future__ import annotations

import torch
from diffusers import BriaFiboTransformer2DModel, BriaTransformer2DModel

from .case import ANY_MASK, Case, Inputs, Layout, key_mask, prompt, timesteps
from .flux import CONFIG, joint_inputs, joint_mask, mask_kwargs


def _inputs(layout: Layout, pads: float) -> Inputs:
    inputs, _ = joint_inputs(layout, pads)
    return {**inputs, "timestep": timesteps(1000)}


def _fibo_inputs(layout: Layout, pads: float) -> Inputs:
    inputs, mask = joint_inputs(layout, pads)
    return {
        **inputs,
        "timestep": timesteps(1000),
        "text_encoder_layers": [prompt(layout, 16, pads, seed=seed)[0] for seed in (2, 3)],
        "joint_attention_kwargs": mask_kwargs(mask),
    }


def _fibo_outer_inputs(layout: Layout, pads: float) -> Inputs:
    inputs = _fibo_inputs(layout, pads)
    mask = key_mask(layout)
    if mask is None:
        return inputs
    valid = joint_mask(mask)
    outer = valid[:, None, :, None] & valid[:, None, None, :]
    additive = torch.zeros(outer.shape).masked_fill(~outer, -torch.inf)
    return {**inputs, "joint_attention_kwargs": {"attention_mask": additive}}


FIBO_CONFIG = {**CONFIG, "text_encoder_dim": 16}

CASES = (
    Case(
        name="bria",
        model=BriaTransformer2DModel,
        config=CONFIG,
        inputs=_inputs,
    ),
    Case(
        name="bria_fibo",
        model=BriaFiboTransformer2DModel,
        config=FIBO_CONFIG,
        inputs=_fibo_inputs,
        layouts=ANY_MASK,
    ),
    Case(
        name="bria_fibo_outer_mask",
        model=BriaFiboTransformer2DModel,
        config=FIBO_CONFIG,
        inputs=_fibo_outer_inputs,
        layouts=("all_true", "right", "ragged"),
    ),
)
