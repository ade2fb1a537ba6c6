"""HunyuanImage 2.1: a token refiner, then joint blocks over [image, text, pads].

The refiner masks outer(valid, valid) with the first key visible to every row, so that no row is
empty: where that key is padding, its content reaches the valid rows. The joint mask is (B, 1, 1, S)
with the text's part as the caller gives it. With a second, glyph-aware text encoder, the valid
tokens of both move to the front: plain padding on the right.
"""

from __future__ import annotations

from diffusers import HunyuanImageTransformer2DModel

from .case import BATCH, Case, Inputs, Layout, prompt, randn, timesteps

GLYPHS = 6  # padded length of the second text encoder's output


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 4, 4, 4),
        "timestep": timesteps(1000),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
    }


def _glyph_inputs(layout: Layout, pads: float) -> Inputs:
    glyphs, mask = prompt(layout, 8, pads, length=GLYPHS, seed=2)
    return {
        **_inputs(layout, pads),
        "encoder_hidden_states_2": glyphs,
        "encoder_attention_mask_2": mask,
    }


CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 1.0,
    "text_embed_dim": 16,
}

CASES = (
    Case(
        name="hunyuan_image",
        model=HunyuanImageTransformer2DModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=("all_true", "right", "ragged", "gap"),
    ),
    Case(
        name="hunyuan_image_left",
        model=HunyuanImageTransformer2DModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=("left",),
        pads=False,  # the refiner shows the first token to all, padding or not
    ),
    Case(
        name="hunyuan_image_glyphs",
        model=HunyuanImageTransformer2DModel,
        config={**CONFIG, "text_embed_2_dim": 8},
        inputs=_glyph_inputs,
        layouts=("all_true", "ragged", "gap"),
    ),
)
