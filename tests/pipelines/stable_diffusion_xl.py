"""Stable Diffusion XL: no mask; and with an IP-Adapter loaded from a state dict."""

from __future__ import annotations

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from zoo.case import Inputs, randn
from zoo.unet import ENCODER_XL, IMAGE_WIDTH, POOLED_WIDTH, TEXT_WIDTH

from .case import PipelineCase
from .parts import (
    PROMPTS,
    clip,
    clip_tokenizer,
    image_processor,
    image_projection,
    picture,
    projected_clip,
    vae,
    vision,
)


def _pipeline() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=clip(TEXT_WIDTH // 2),
        text_encoder_2=projected_clip(TEXT_WIDTH // 2, POOLED_WIDTH),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=UNet2DConditionModel(
            **ENCODER_XL, sample_size=8, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
        ),
        scheduler=EulerDiscreteScheduler(),
        image_encoder=vision(IMAGE_WIDTH),
        feature_extractor=image_processor(),
        add_watermarker=False,
    )


def _with_ip_adapter() -> StableDiffusionXLPipeline:
    pipe = _pipeline()
    load_ip_adapter(pipe)
    return pipe


def load_ip_adapter(pipe: StableDiffusionXLPipeline) -> None:
    """Load an IP-Adapter from a state dict, and give it a scale, as a user does."""
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="")
    pipe.set_ip_adapter_scale(0.8)


def ip_adapter(unet: UNet2DConditionModel) -> dict[str, dict[str, torch.Tensor]]:
    """The state dict of an IP-Adapter: two projections for each cross attention."""
    layers = [name.removesuffix(".processor") for name in unet.attn_processors]
    return {
        "image_proj": image_projection(IMAGE_WIDTH, TEXT_WIDTH),
        "ip_adapter": {
            f"{2 * i + 1}.{layer}.weight": randn(
                unet.get_submodule(name).inner_dim, TEXT_WIDTH, seed=seed
            )
            / 4
            for i, name in enumerate(name for name in layers if name.endswith("attn2"))
            for seed, layer in enumerate(("to_k_ip", "to_v_ip"))
        },
    }


def inputs() -> Inputs:
    """Two prompts, latents of 8x8."""
    return {
        "prompt": PROMPTS,
        "height": 8,
        "width": 8,
        "num_inference_steps": 2,
        "latents": randn(len(PROMPTS), 4, 8, 8),
    }


def _image_inputs() -> Inputs:
    return {**inputs(), "ip_adapter_image": picture()}


CASES = (
    PipelineCase(name="sdxl", make=_pipeline, inputs=inputs, denoisers=("unet",)),
    PipelineCase(
        name="sdxl_ip_adapter", make=_with_ip_adapter, inputs=_image_inputs, denoisers=("unet",)
    ),
)
