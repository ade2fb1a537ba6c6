"""ERNIE-Image: [image, text, pads], told by the lengths of the texts, so pads are on the right.

The bool mask [B, 1, 1, S] is passed even where it is all true; one object for all layers.
"""

from __future__ import annotations

from diffusers import ErnieImageTransformer2DModel

from .case import BATCH, RIGHT_ONLY, Case, Inputs, Layout, prompt, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    assert mask is not None
    return {
        "hidden_states": randn(BATCH, 4, 4, 4),
        "timestep": timesteps(1000),
        "text_bth": text,
        "text_lens": mask.sum(-1),
    }


CASES = (
    Case(
        name="ernie_image",
        model=ErnieImageTransformer2DModel,
        config={
            "hidden_size": 256,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 16,
        },
        inputs=_inputs,
        layouts=RIGHT_ONLY,
    ),
)
