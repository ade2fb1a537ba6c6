"""LTX-Video: T5, whose padding is hidden from cross attention."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from zoo.case import Inputs, randn
from zoo.ltx import CASES as ZOO

from .case import PipelineCase
from .parts import PROMPTS, TEXT, t5, t5_tokenizer

CONFIG = ZOO[0].config
VAE_CONFIG = {
    "latent_channels": CONFIG["in_channels"],
    "block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "layers_per_block": (1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, True),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "decoder_inject_noise": (False, False, False, False),
    "upsample_residual": (False, False, False),
    "upsample_factor": (1, 1, 1),
    "patch_size": 1,
}


def _pipeline() -> LTXPipeline:
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLLTXVideo(**VAE_CONFIG),
        text_encoder=t5(CONFIG["caption_channels"]),
        tokenizer=t5_tokenizer(),
        transformer=LTXVideoTransformer3DModel(**CONFIG),
    )


def _inputs() -> Inputs:
    return {
        "prompt": PROMPTS,
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "num_inference_steps": 2,
        "max_sequence_length": TEXT,
        "latents": randn(len(PROMPTS), 2 * 4 * 4, CONFIG["in_channels"]),
    }


CASES = (
    PipelineCase(
        name="ltx",
        make=_pipeline,
        inputs=_inputs,
        routes=frozenset({"dense", "seqused"}),
        masked=True,
    ),
)
