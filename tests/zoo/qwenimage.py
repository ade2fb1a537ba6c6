"""Qwen-Image: the joint mask is [text, pads, image], built anew in every layer."""

from __future__ import annotations

from diffusers import QwenImageTransformer2DModel

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, prompt, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 16, 16),
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": mask,
        "timestep": timesteps(),
        "img_shapes": [(1, 4, 4)] * BATCH,
    }


CASES = (
    Case(
        name="qwenimage",
        model=QwenImageTransformer2DModel,
        config={
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 128,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (16, 56, 56),
        },
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
)
