"""SANA-WM and its refiner: cross attention over text with the padding that the caller gives.

SANA-WM masks with bool (B, 1, 1, K), and needs the mask; the refiner with additive -1e4, per head,
rebuilt in every layer. Most self attention of SANA-WM is a linear recurrence. Every fourth layer
of the released model is softmax instead, in modules without a processor, in bfloat16 and over a
head size padded to 128; that is a case of its own. The refiner's self attention may put cached
keys in front of its own (the KV cache case, with the other processor for cross attention).
"""

from __future__ import annotations

import torch
from diffusers import SanaWMLTX2RefinerTransformer3DModel, SanaWMTransformer3DModel
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, key_mask, prompt, randn, timesteps

CAPTION = 16
FRAMES = 3
SIDE = 2
TOKENS = FRAMES * SIDE * SIDE
SINK = SIDE * SIDE  # one frame
HISTORY = 2 * SIDE * SIDE  # two frames
REFINER_WIDTH = 256

CONFIG = {
    "in_channels": 4,
    "num_layers": 1,
    "hidden_size": 224,
    "num_attention_heads": 2,
    "linear_head_dim": 112,
    "use_chunk_plucker_post_attn": False,
    "caption_channels": CAPTION,
    "mlp_ratio": 0.5,
}
REFINER_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "cross_attention_dim": REFINER_WIDTH,
    # Weights of the audio branch are there, but never used.
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 1,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 8,
    "num_layers": 1,
    "caption_channels": CAPTION,
}


def _cameras() -> Inputs:
    """Cameras and what the model makes of them, which it cannot compute in bfloat16 on a CPU."""
    rays = torch.eye(4).repeat(BATCH, TOKENS, 1, 1)
    rays[..., 0, 3] = torch.arange(TOKENS) / TOKENS
    return {
        "camera_conditions": randn(BATCH, FRAMES, 20, seed=2),
        "cam_pos_embeds": {
            "absmap": randn(BATCH, 3, FRAMES, SIDE, SIDE, seed=3),
            "P": rays,
            "P_inv": rays.inverse(),
        },
    }


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, CAPTION, pads)
    return {
        "hidden_states": randn(BATCH, 4, FRAMES, SIDE, SIDE),
        "timestep": timesteps(1000).view(BATCH, 1, 1).expand(BATCH, 1, FRAMES),
        "encoder_hidden_states": text.unsqueeze(1),
        "encoder_attention_mask": key_mask("all_true") if mask is None else mask,
        **_cameras(),
    }


def _rope(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = randn(BATCH, tokens, REFINER_WIDTH // 2, seed=seed).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def _refiner_inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, CAPTION, pads)
    return {
        "hidden_states": randn(BATCH, TOKENS, 4),
        "encoder_hidden_states": text,
        "timestep": timesteps(1000).unsqueeze(1).expand(BATCH, TOKENS),
        "video_rotary_emb": _rope(TOKENS, seed=2),
        "encoder_attention_mask": mask,
    }


def _cached_inputs(layout: Layout, pads: float) -> Inputs:
    cache = SanaWMRefinerKVCache(num_layers=1)
    cache.sink_pe = _rope(SINK, seed=3)
    cache.get(0).store_sink(*randn(2, BATCH, SINK, REFINER_WIDTH, seed=4))
    cache.get(0).store_history(*randn(2, BATCH, HISTORY, REFINER_WIDTH, seed=5))
    return {**_refiner_inputs(layout, pads), "kv_cache": cache, "kv_cache_mode": "inject"}


CASES = (
    Case(
        name="sana_wm",
        model=SanaWMTransformer3DModel,
        config={**CONFIG, "softmax_every_n": 0},
        inputs=_inputs,
        layouts=("all_true", "right", "left", "ragged", "gap"),
    ),
    Case(
        name="sana_wm_softmax",
        model=SanaWMTransformer3DModel,
        config={**CONFIG, "softmax_every_n": 1},
        inputs=_inputs,
        layouts=("all_true", "right"),
        unreached="softmax self attention has no processor: a module calls torch's attention "
        "itself; only the cross attention is switched",
    ),
    Case(
        name="sana_wm_refiner",
        model=SanaWMLTX2RefinerTransformer3DModel,
        config=REFINER_CONFIG,
        inputs=_refiner_inputs,
        layouts=ANY_MASK,
    ),
    Case(
        name="sana_wm_refiner_kv_cache",
        model=SanaWMLTX2RefinerTransformer3DModel,
        config={**REFINER_CONFIG, "perturbed_attn": True},
        inputs=_cached_inputs,
        layouts=("none", "ragged"),
    ),
)
