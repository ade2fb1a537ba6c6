"""Stable Diffusion 1.5 with one ControlNet and with two: no mask, two or three denoisers."""

from __future__ import annotations

from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from zoo.case import Inputs, randn
from zoo.unet import CONFIG, ENCODER, TEXT_WIDTH

from .case import PipelineCase
from .parts import PROMPTS, clip, clip_tokenizer, vae


def _pipeline(
    controlnet: ControlNetModel | list[ControlNetModel],
) -> StableDiffusionControlNetPipeline:
    return StableDiffusionControlNetPipeline(
        vae=vae(4),
        text_encoder=clip(TEXT_WIDTH),
        tokenizer=clip_tokenizer(),
        unet=UNet2DConditionModel(**CONFIG),
        controlnet=controlnet,
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _controlnet() -> ControlNetModel:
    return ControlNetModel(**ENCODER, conditioning_embedding_out_channels=(16,))


def _inputs() -> Inputs:
    return {
        "prompt": PROMPTS,
        "image": randn(len(PROMPTS), 3, 8, 8, seed=3),
        "num_inference_steps": 2,
        "latents": randn(len(PROMPTS), 4, 8, 8),
    }


def _two_inputs() -> Inputs:
    return {**_inputs(), "image": [randn(len(PROMPTS), 3, 8, 8, seed=seed) for seed in (3, 4)]}


CASES = (
    PipelineCase(
        name="sd15_controlnet",
        make=lambda: _pipeline(_controlnet()),
        inputs=_inputs,
        denoisers=("unet", "controlnet"),
    ),
    PipelineCase(
        name="sd15_two_controlnets",
        make=lambda: _pipeline([_controlnet(), _controlnet()]),
        inputs=_two_inputs,
        denoisers=("unet", "controlnet"),
    ),
)
