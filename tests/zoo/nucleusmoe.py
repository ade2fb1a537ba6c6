"""NucleusMoE-Image: image queries over [image, text, pads]; a 2-D bool mask [B, Sk].

Keys and values have fewer heads and are repeated. With diffusers' cache of text keys and values,
which hooks into the blocks, the processor gets these in place of the text.
"""

from __future__ import annotations

from diffusers import NucleusMoEImageTransformer2DModel, TextKVCacheConfig
from torch import nn

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, prompt, randn, timesteps

EXPERTS = 2
CONFIG = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "joint_attention_dim": 16,
    "dense_moe_strategy": "leave_first_block_dense",
    "num_experts": EXPERTS,
    "capacity_factors": float(EXPERTS),  # every expert takes every token: routing is continuous
    "moe_intermediate_dim": 32,
}


def fill_experts(model: nn.Module) -> None:
    """Give weights to the experts, which start as whatever lay in memory."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            nn.init.normal_(parameter, std=0.1)


def cache_text(model: nn.Module) -> None:
    """Keep the keys and values of the text from one forward to the next."""
    fill_experts(model)
    model.enable_cache(TextKVCacheConfig())


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 16, 16),
        "img_shapes": [(1, 4, 4)] * BATCH,
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": mask,
        "timestep": timesteps(),
    }


CASES = (
    Case(
        name="nucleusmoe",
        model=NucleusMoEImageTransformer2DModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=ANY_MASK,
        prepare=fill_experts,
    ),
    Case(
        name="nucleusmoe_text_cache",
        model=NucleusMoEImageTransformer2DModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=("none", "ragged"),
        prepare=cache_text,
    ),
)
