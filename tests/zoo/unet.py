"""UNet2DConditionModel as in Stable Diffusion 1.5 and XL, and as in unCLIP and DeepFloyd IF.

The mask of the text is additive, -1e4, per head. An IP-Adapter adds one unmasked call per image to
every cross attention; its own masks weigh the result, they do not reach the attention call. The
blocks of unCLIP attend to [text, pads, image] at once; IF's later stages attend to text alone, and
a mask makes diffusers itself fail there.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from torch import nn

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, prompt, randn, timesteps

TEXT_WIDTH = 32
IMAGE_WIDTH = 16
IMAGE_TOKENS = 4

SHARED = {"layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": TEXT_WIDTH}

ENCODER = {
    **SHARED,
    "block_out_channels": (80, 160),
    "attention_head_dim": 2,  # diffusers' name for the number of heads: head sizes 40 and 80
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}
"""What a UNet as in Stable Diffusion 1.5 shares with its ControlNet."""

CONFIG = {
    **ENCODER,
    "sample_size": 8,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}

POOLED_WIDTH = 16
TIME_WIDTH = 8

ENCODER_XL = {
    **SHARED,
    "block_out_channels": (64, 128),
    "attention_head_dim": (1, 2),  # number of heads: all are 64 wide
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_WIDTH,
    "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * TIME_WIDTH,
}
"""What a UNet as in Stable Diffusion XL shares with its ControlNet."""

CONFIG_ADDED_KV = {
    **SHARED,
    "sample_size": 8,
    "block_out_channels": (64, 128),
    "attention_head_dim": 64,  # here it is what it says
    "resnet_time_scale_shift": "scale_shift",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}


def add_ip_adapter(unet: nn.Module) -> None:
    """Load a random IP-Adapter the way diffusers' loader does: processors with weights."""
    unet.set_attn_processor(
        {
            name: IPAdapterAttnProcessor2_0(
                unet.get_submodule(name.removesuffix(".processor")).inner_dim,
                TEXT_WIDTH,
                num_tokens=(IMAGE_TOKENS,),
                scale=0.8,
            )
            if "attn2" in name
            else processor
            for name, processor in unet.attn_processors.items()
        }
    )
    projection = ImageProjection(IMAGE_WIDTH, TEXT_WIDTH, num_image_text_embeds=IMAGE_TOKENS)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")


def fuse_projections(unet: nn.Module) -> None:
    """Project q, k and v in one layer, which brings a processor of its own."""
    unet.fuse_qkv_projections()


def added_conditions() -> Inputs:
    """Return the pooled text and the six sizes that Stable Diffusion XL is conditioned on."""
    sizes = torch.tensor([1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0])
    return {"text_embeds": randn(BATCH, POOLED_WIDTH, seed=3), "time_ids": sizes.repeat(BATCH, 1)}


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, TEXT_WIDTH, pads)
    return {
        "sample": randn(BATCH, 4, 8, 8),
        "timestep": timesteps(1000),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
    }


def _xl_inputs(layout: Layout, pads: float) -> Inputs:
    return {**_inputs(layout, pads), "added_cond_kwargs": added_conditions()}


def _ip_adapter_inputs(layout: Layout, pads: float) -> Inputs:
    embeds = randn(BATCH, 1, IMAGE_WIDTH, seed=2)
    return {**_inputs(layout, pads), "added_cond_kwargs": {"image_embeds": [embeds]}}


def _masked_ip_adapter_inputs(layout: Layout, pads: float) -> Inputs:
    embeds = randn(BATCH, 2, IMAGE_WIDTH, seed=2)
    halves = torch.zeros(1, 2, 8, 8)
    halves[:, 0, :, :4] = halves[:, 1, :, 4:] = 1.0
    return {
        **_inputs(layout, pads),
        "added_cond_kwargs": {"image_embeds": [embeds]},
        "cross_attention_kwargs": {"ip_adapter_masks": [halves]},
    }


CASES = (
    Case(
        name="unet_sd15",
        model=UNet2DConditionModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
    Case(
        name="unet_fused_projections",
        model=UNet2DConditionModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=("none", "ragged"),
        prepare=fuse_projections,
    ),
    Case(
        name="unet_sdxl",
        model=UNet2DConditionModel,
        config={
            **ENCODER_XL,
            "sample_size": 8,
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        inputs=_xl_inputs,
        layouts=ANY_MASK,
    ),
    Case(
        name="unet_added_kv",
        model=UNet2DConditionModel,
        config=CONFIG_ADDED_KV,
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
    Case(
        name="unet_added_kv_text_only",
        model=UNet2DConditionModel,
        config={
            **CONFIG_ADDED_KV,
            "only_cross_attention": True,
            "cross_attention_norm": "group_norm",
        },
        inputs=_inputs,
    ),
    Case(
        name="unet_ip_adapter",
        model=UNet2DConditionModel,
        config=CONFIG,
        inputs=_ip_adapter_inputs,
        layouts=("none", "ragged"),
        prepare=add_ip_adapter,
    ),
    Case(
        name="unet_ip_adapter_masks",
        model=UNet2DConditionModel,
        config=CONFIG,
        inputs=_masked_ip_adapter_inputs,
        layouts=("none",),
        prepare=add_ip_adapter,
    ),
)
