"""PixArt Sigma and Alpha: T5, whose padding is hidden from cross attention."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from zoo.case import Inputs, randn
from zoo.pixart import CASES as ZOO

from .case import PipelineCase
from .parts import PROMPTS, TEXT, t5, t5_tokenizer, vae

CONFIG = ZOO[0].config


def _components() -> dict[str, Any]:
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5(CONFIG["caption_channels"]),
        "vae": vae(CONFIG["in_channels"]),
        "transformer": PixArtTransformer2DModel(**CONFIG),
        "scheduler": DDIMScheduler(clip_sample=False),
    }


def inputs() -> Inputs:
    """Two prompts, latents of 8x8."""
    return {
        "prompt": PROMPTS,
        "height": 8,
        "width": 8,
        "num_inference_steps": 2,
        "clean_caption": False,
        "use_resolution_binning": False,
        "max_sequence_length": TEXT,
        "latents": randn(len(PROMPTS), CONFIG["in_channels"], 8, 8),
    }


CASES = tuple(
    PipelineCase(
        name=name,
        make=lambda pipeline=pipeline: pipeline(**_components()),
        inputs=inputs,
        routes=frozenset({"dense", "seqused"}),
        masked=True,
    )
    for name, pipeline in (
        ("pixart_sigma", PixArtSigmaPipeline),
        ("pixart_alpha", PixArtAlphaPipeline),
    )
)

PERTURBED = PipelineCase(
    name="pixart_sigma_pag",
    make=lambda: PixArtSigmaPAGPipeline(**_components(), pag_applied_layers="blocks.1"),
    inputs=inputs,
)
"""Not among CASES: it perturbs the attention of its last block, by processors of its own."""
