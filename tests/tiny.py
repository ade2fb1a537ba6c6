"""Small models and pipelines for tests of switching in which the model family does not matter."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

CONFIG = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 4, 8),
}
LAYERS = 3


def flux() -> FluxTransformer2DModel:
    """A Flux transformer of two double blocks and one single block; the same weights every time."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(**CONFIG).eval()


def forward(model: FluxTransformer2DModel, seed: int = 0) -> torch.Tensor:
    """One forward on random inputs that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 4, generator=generator),
            encoder_hidden_states=torch.randn(1, 3, 8, generator=generator),
            pooled_projections=torch.randn(1, 8, generator=generator),
            timestep=torch.ones(1),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
            return_dict=False,
        )[0]


def vae() -> AutoencoderKL:
    """A VAE with one attention layer."""
    return AutoencoderKL(block_out_channels=(32,), latent_channels=1).eval()


def pipeline() -> FluxPipeline:
    """A pipeline with a transformer and a VAE, both of which have attention layers."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux(),
    )


def controlled_pipeline() -> FluxControlNetPipeline:
    """A pipeline with two models that denoise."""
    return FluxControlNetPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux(),
        controlnet=FluxControlNetModel(**CONFIG, patch_size=1),
    )
