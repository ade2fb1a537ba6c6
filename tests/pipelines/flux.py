"""FLUX.1: CLIP and T5, no mask; and with an IP-Adapter loaded from a state dict."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from zoo.case import Inputs, randn
from zoo.flux import CONFIG, PROMPT_IMAGE_WIDTH, TEXT_WIDTH

from .case import PipelineCase
from .parts import (
    PROMPTS,
    TEXT,
    clip,
    clip_tokenizer,
    image_processor,
    image_projection,
    picture,
    t5,
    t5_tokenizer,
    vae,
    vision,
)

WIDTH = CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]


def _pipeline() -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(CONFIG["in_channels"] // 4),
        text_encoder=clip(32),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(TEXT_WIDTH),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(**CONFIG, pooled_projection_dim=32),
        image_encoder=vision(PROMPT_IMAGE_WIDTH),
        feature_extractor=image_processor(),
    )


def _with_ip_adapter() -> FluxPipeline:
    pipe = _pipeline()
    pipe.load_ip_adapter(
        ip_adapter(), weight_name="", image_encoder_pretrained_model_name_or_path=None
    )
    pipe.set_ip_adapter_scale(0.8)
    return pipe


def ip_adapter() -> dict[str, dict[str, torch.Tensor]]:
    """The state dict of an IP-Adapter for the one double block."""
    return {
        "image_proj": image_projection(PROMPT_IMAGE_WIDTH, TEXT_WIDTH),
        "ip_adapter": {
            f"0.{layer}.{kind}": randn(*shape, seed=seed) / 4
            for seed, layer in enumerate(("to_k_ip", "to_v_ip"))
            for kind, shape in (("weight", (WIDTH, TEXT_WIDTH)), ("bias", (WIDTH,)))
        },
    }


def inputs() -> Inputs:
    """Two prompts, 4x4 image tokens."""
    return {
        "prompt": PROMPTS,
        "height": 8,
        "width": 8,
        "num_inference_steps": 2,
        "max_sequence_length": TEXT,
        "latents": randn(len(PROMPTS), 16, CONFIG["in_channels"]),
    }


def _image_inputs() -> Inputs:
    return {
        **inputs(),
        "ip_adapter_image": picture(),
        "negative_prompt": ["", ""],
        "true_cfg_scale": 2.0,
    }


CASES = (
    PipelineCase(name="flux", make=_pipeline, inputs=inputs),
    PipelineCase(name="flux_ip_adapter", make=_with_ip_adapter, inputs=_image_inputs),
)
