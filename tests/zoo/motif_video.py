"""Motif-Video: the joint mask is [video, image, text, pads], right padding as the pipeline pads.

Dual and single blocks add a cross attention to the text alone, masked by a slice of that mask; the
single blocks at the end decode, over [video, encoded video] without a mask.
"""

from __future__ import annotations

from diffusers import MotifVideoTransformer3DModel
from torch import nn

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, cast_input, prompt, randn, timesteps


def _prepare(model: nn.Module) -> None:
    # What the first single block finds reaches the output by way of the decoder's keys alone.
    model.single_transformer_blocks[0].proj_out.weight.data *= 30
    cast_input(model.time_text_embed.timestep_embedder.linear_1)  # it casts to half precision alone


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 4, 1, 8, 8),
        "timestep": timesteps(1000),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "image_embeds": randn(BATCH, 3, 12, seed=2),
    }


CASES = (
    Case(
        name="motif_video",
        model=MotifVideoTransformer3DModel,
        config={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 128,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_decoder_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 16,
            "image_embed_dim": 12,
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        inputs=_inputs,
        layouts=ANY_MASK,
        prepare=_prepare,
    ),
)
