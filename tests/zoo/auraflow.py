"""AuraFlow: no mask, head size 256, and the scale of the logits spelled out in every call."""

from __future__ import annotations

import torch
from diffusers import AuraFlowTransformer2DModel
from torch import nn

from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": randn(BATCH, TEXT, 16, seed=1),
        "timestep": timesteps(),
    }


def enlarge_values(transformer: nn.Module) -> None:
    """Let attention count: a norm and a gate stand between it and the output."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith(("to_v.weight", "add_v_proj.weight")):
                parameter.mul_(8.0)


CASES = (
    Case(
        name="auraflow",
        model=AuraFlowTransformer2DModel,
        config={
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 256,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 512,
            "pos_embed_max_size": 16,
        },
        inputs=_inputs,
        prepare=enlarge_values,
    ),
)
