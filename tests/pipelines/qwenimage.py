"""Qwen-Image: prompts of different length make a mask [text, pads, image]; with true CFG, two."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from releases import QWENIMAGE_MASKS, has
from zoo.case import Inputs, randn
from zoo.qwenimage import CONFIG

from .case import PipelineCase
from .parts import PROMPTS, qwen, qwen_tokenizer

MASKED = has(QWENIMAGE_MASKS[0])
ROUTES = frozenset({"packed" if MASKED else "dense"})


def _pipeline() -> QwenImagePipeline:
    return QwenImagePipeline(**components())


def components() -> Inputs:
    """The components, by name."""
    channels = CONFIG["out_channels"]
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=channels,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        ),
        "text_encoder": qwen(),
        "tokenizer": qwen_tokenizer(),
        "transformer": QwenImageTransformer2DModel(**{**CONFIG, "joint_attention_dim": 64}),
    }


def inputs() -> Inputs:
    """Two prompts, 4x4 image tokens."""
    return {
        "prompt": PROMPTS,
        "true_cfg_scale": 1.0,
        "height": 16,
        "width": 16,
        "num_inference_steps": 2,
        "latents": randn(len(PROMPTS), 16, CONFIG["in_channels"]),
    }


def _guided() -> Inputs:
    return {**inputs(), "negative_prompt": ["blurry and dark", "red"], "true_cfg_scale": 4.0}


CASES = (
    PipelineCase(
        name="qwenimage",
        make=_pipeline,
        inputs=inputs,
        routes=ROUTES,
        masked=MASKED,
    ),
    PipelineCase(
        name="qwenimage_true_cfg",
        make=_pipeline,
        inputs=_guided,
        routes=ROUTES,
        masked=MASKED,
    ),
)
