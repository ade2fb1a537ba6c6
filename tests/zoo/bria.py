"""Bria: 3.2 drops every mask on its way to the blocks; FIBO and FIBO 2 mask text.

FIBO's blocks are those of FLUX.1, and its mask over [text, pads, image] is the caller's: one row
of bool per sample, or, in pipelines up to diffusers 0.40, outer(valid, valid) as 0 and -inf.
FIBO 2 squeezes text into gist tokens, whose number follows from the length of the text. Attention
to text has its mask as given. Where samples have different numbers of gist tokens, these are
padded and put last, so the joint mask hides keys on the right, whatever the layout of the text.
"""

from __future__ import annotations

import torch
from diffusers import (
    BriaFibo2Transformer2DModel,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
)

from .case import ANY_MASK, BATCH, TEXT, Case, Inputs, Layout, key_mask, prompt, randn, timesteps
from .flux import CONFIG, joint_inputs, joint_mask, mask_kwargs

BUNDLE_WIDTH = 24


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


def _fibo2_inputs(layout: Layout, pads: float) -> Inputs:
    bundles = [prompt(layout, BUNDLE_WIDTH, pads, seed=seed)[0] for seed in (1, 2)]
    return {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "timestep": timesteps(),
        "encoder_hidden_states": torch.stack(bundles, dim=1),
        "encoder_attention_mask": key_mask(layout),
    }


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
    Case(
        name="bria_fibo2",
        model=BriaFibo2Transformer2DModel,
        config={
            "in_channels": 4,
            "dim": 256,
            "n_heads": 2,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "cap_feat_dim": BUNDLE_WIDTH,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            # 6 gist tokens for 8 words, 4 and 8 in the ragged batch
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": TEXT,
            "axes_dims": (32, 48, 48),
            "axes_lens": (16, 8, 8),
        },
        inputs=_fibo2_inputs,
        layouts=ANY_MASK,
    ),
)
