"""AudioLDM 2: two conditions, one block each, after a block with self attention only.

The generated tokens come without a mask; that of the text is additive, -1e4, per head.
"""

from __future__ import annotations

from diffusers.pipelines.audioldm2 import AudioLDM2UNet2DConditionModel

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, prompt, randn, timesteps

TEXT_WIDTH = 32
GENERATED = 8
GENERATED_WIDTH = 16


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, TEXT_WIDTH, pads)
    return {
        "sample": randn(BATCH, 4, 8, 8),
        "timestep": timesteps(1000),
        "encoder_hidden_states": randn(BATCH, GENERATED, GENERATED_WIDTH, seed=2),
        "encoder_hidden_states_1": text,
        "encoder_attention_mask_1": mask,
    }


CASES = (
    Case(
        name="audioldm2",
        model=AudioLDM2UNet2DConditionModel,
        config={
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": ((None, GENERATED_WIDTH, TEXT_WIDTH),) * 2,
            "attention_head_dim": 2,  # diffusers' name for the number of heads
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
)
