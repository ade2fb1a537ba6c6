"""Kandinsky 3: additive -1e4 per head on the text, which always comes with a mask.

The first call pools the text: one query, the mean of all text tokens. Padded tokens are part of
that mean, hence `pads=False`; the pipeline sets them to zero.
"""

from __future__ import annotations

from diffusers import Kandinsky3UNet

from .case import BATCH, Case, Inputs, Layout, prompt, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "sample": randn(BATCH, 4, 8, 8),
        "timestep": timesteps(1000),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
    }


CASES = (
    Case(
        name="kandinsky3",
        model=Kandinsky3UNet,
        config={
            "time_embedding_dim": 128,
            "groups": 8,
            "attention_head_dim": 64,
            "layers_per_block": 2,
            "block_out_channels": (128, 128),  # half the first must hold a head
            "cross_attention_dim": 32,
            "encoder_hid_dim": 16,
        },
        inputs=_inputs,
        layouts=("all_true", "right", "left", "ragged", "gap"),
        pads=False,
    ),
)
