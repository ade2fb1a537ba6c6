"""GLM-Image: [text, image]; pipelines pass no mask.

A text mask becomes outer(valid, valid) as floats 0 and 1, added to the scores, as in CogView4.
In key-value cache mode, one forward per condition image writes the cache, sample after sample; the
next ones put it before their own keys, Sq < Sk.
"""

from __future__ import annotations

import torch
from diffusers import GlmImageTransformer2DModel
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

from .case import BATCH, Case, Inputs, Layout, Refusal, prompt, randn, timesteps

IMAGE = 16
WORDS = 64  # of the prior that comes with the latents


class TwoSteps(GlmImageTransformer2DModel):
    """What diffusers' pipeline for condition images does, in one forward.

    Returned with the last output are those of the forwards that write. Nobody uses them, but
    without them nobody would see the last of their attention calls.
    """

    def forward(self, condition: Inputs, **inputs: object) -> tuple[torch.Tensor]:
        """Write the cache from `condition`, one sample at a time, and read it."""
        cache = GlmImageKVCache(len(self.transformer_blocks))
        cache.set_mode("write")
        written = []
        for i in range(BATCH):
            one = {name: value[i : i + 1] for name, value in condition.items()}
            written.append(super().forward(**one, kv_caches=cache, return_dict=False)[0])
            cache.next_sample()
        cache.set_mode("read")
        return (torch.cat([*written, super().forward(**inputs, kv_caches=cache)[0]]),)


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, _ = prompt(layout, 16, pads)
    size = torch.full((BATCH, 2), 64)
    return {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": text,
        "prior_token_id": torch.arange(BATCH * IMAGE).view(BATCH, IMAGE),
        "prior_token_drop": torch.arange(BATCH) == 1,
        "timestep": timesteps(1000),
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }


def _mask_inputs(layout: Layout, pads: float) -> Inputs:
    return {**_inputs(layout, pads), "attention_mask": prompt(layout, 16)[1]}


def _cache_inputs(layout: Layout, pads: float) -> Inputs:
    inputs = _inputs(layout, pads)
    condition = {
        **inputs,
        "hidden_states": randn(BATCH, 4, 8, 8, seed=2),
        "encoder_hidden_states": randn(BATCH, 0, 16),
        "timestep": torch.zeros(BATCH),
    }
    return {**inputs, "condition": condition}


CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 40,
    "num_attention_heads": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 16,
    "condition_dim": 8,
    "prior_vq_quantizer_codebook_size": WORDS,
}

CASES = (
    Case(
        name="glm_image",
        model=GlmImageTransformer2DModel,
        config=CONFIG,
        inputs=_inputs,
    ),
    Case(
        name="glm_image_mask",
        model=GlmImageTransformer2DModel,
        config=CONFIG,
        inputs=_mask_inputs,
        layouts=("all_true", "ragged"),
        refusal=Refusal(layer=r"attn1", reason=r"bias"),
        pads=False,
    ),
    Case(
        name="glm_image_kv_cache",
        model=TwoSteps,
        config=CONFIG,
        inputs=_cache_inputs,
    ),
)
