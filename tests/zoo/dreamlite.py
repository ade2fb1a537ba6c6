"""DreamLite: a UNet whose blocks attend with grouped key heads, and its transformer by itself.

The UNet masks the text with an additive -1e4 per head, in every cross attention; its processor
calls diffusers' dispatcher. The transformer by itself has the processor of all UNets and passes a
bool mask per head. Some blocks of the UNet have cross attention only.
"""

from __future__ import annotations

from diffusers import DreamLiteTransformer2DModel, DreamLiteUNetModel

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, prompt, randn, timesteps

TEXT_WIDTH = 32


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, TEXT_WIDTH, pads)
    return {
        "sample": randn(BATCH, 4, 8, 8),
        "timestep": timesteps(1000),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"time_ids": timesteps(1000)[:, None].repeat(1, 2)},
    }


def _transformer_inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, TEXT_WIDTH, pads)
    return {
        "hidden_states": randn(BATCH, 64, 4, 4),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
    }


CASES = (
    Case(
        name="dreamlite",
        model=DreamLiteUNetModel,
        config={
            "sample_size": 8,
            "block_out_channels": (64, 128),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": TEXT_WIDTH,
            "attention_head_dim": (1, 2),  # diffusers' name for the number of heads
            "num_kv_heads": 1,
            "qk_norm": "rms_norm",
            "use_sep_conv": True,
            "ff_mult": 2,
            "down_block_types": (
                "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
                "DreamLiteCrossAttnDownBlock2D",
            ),
            "up_block_types": (
                "DreamLiteCrossAttnUpBlock2D",
                "DreamLiteUpBlock2D",
            ),
            "encoder_hid_dim": TEXT_WIDTH,
            "encoder_hid_dim_type": "text_proj_rms",
            "addition_embed_type": "time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16,
        },
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
    Case(
        name="dreamlite_transformer",
        model=DreamLiteTransformer2DModel,
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "in_channels": 64,
            "norm_num_groups": 8,
            "cross_attention_dim": TEXT_WIDTH,
        },
        inputs=_transformer_inputs,
        layouts=ANY_MASK,
    ),
)
