"""Bria FIBO 2: text is squeezed into gist tokens, whose number follows from its length.

Attention to text has its mask as given. Where samples have different numbers of gist tokens, these
are padded and put last, so the joint mask hides keys on the right, whatever the layout of the text.
"""

from __future__ import annotations

import torch
from diffusers import BriaFibo2Transformer2DModel

from .case import ANY_MASK, BATCH, TEXT, Case, Inputs, Layout, key_mask, prompt, randn, timesteps

BUNDLE_WIDTH = 24


def _inputs(layout: Layout, pads: float) -> Inputs:
    bundles = [prompt(layout, BUNDLE_WIDTH, pads, seed=seed)[0] for seed in (1, 2)]
    return {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "timestep": timesteps(),
        "encoder_hidden_states": torch.stack(bundles, dim=1),
        "encoder_attention_mask": key_mask(layout),
    }


CASES = (
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
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
)
