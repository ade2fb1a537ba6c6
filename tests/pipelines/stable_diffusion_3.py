"""Stable Diffusion 3.5: two CLIPs and T5, no mask, guidance in one batch."""

from __future__ import annotations

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from zoo.case import Inputs, randn
from zoo.sd3 import CONFIG

from .case import PipelineCase
from .parts import PROMPTS, TEXT, clip_tokenizer, projected_clip, t5, t5_tokenizer, vae


def _pipeline() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**CONFIG),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(CONFIG["in_channels"]),
        text_encoder=projected_clip(16, 16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=projected_clip(16, 16),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(CONFIG["joint_attention_dim"]),
        tokenizer_3=t5_tokenizer(),
    )


def _inputs() -> Inputs:
    return {
        "prompt": PROMPTS,
        "height": 8,
        "width": 8,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "max_sequence_length": TEXT,
        "latents": randn(len(PROMPTS), CONFIG["in_channels"], 8, 8),
    }


CASES = (PipelineCase(name="sd3", make=_pipeline, inputs=_inputs),)
