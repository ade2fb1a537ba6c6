"""Wan 2.2: two transformers, one for early and one for late steps; T5, no mask."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from zoo.case import Inputs, randn
from zoo.wan import CONFIG

from .case import PipelineCase
from .parts import PROMPTS, TEXT, t5, t5_tokenizer


def _pipeline() -> WanPipeline:
    channels = CONFIG["in_channels"]
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(CONFIG["text_dim"]),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=channels,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            scale_factor_temporal=2,
            scale_factor_spatial=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=WanTransformer3DModel(**CONFIG),
        transformer_2=WanTransformer3DModel(**CONFIG),
        boundary_ratio=0.75,
    )


def _inputs() -> Inputs:
    return {
        "prompt": PROMPTS,
        "height": 16,
        "width": 16,
        "num_frames": 3,
        "num_inference_steps": 2,
        "max_sequence_length": TEXT,
        "latents": randn(len(PROMPTS), CONFIG["in_channels"], 2, 8, 8),
    }


CASES = (
    PipelineCase(
        name="wan22", make=_pipeline, inputs=_inputs, denoisers=("transformer", "transformer_2")
    ),
)
