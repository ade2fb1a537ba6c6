"""OmniGen: [text, time, image] with one additive mask [B, 1, S, S], made by the caller.

Text and time are causal, the image sees all, an image within the text sees itself as well as what
precedes it. No valid token sees a pad; pads, which pipelines put on the left, see everything.
"""

from __future__ import annotations

import torch
from diffusers import OmniGenTransformer2DModel

from .case import BATCH, TEXT, Case, Inputs, Layout, key_mask, randn, timesteps

HEAD_DIM = 96
IMAGE = 80  # so many that pads, which see everything, are worth a copy of all keys
WITHIN = (6, 10)  # where the text has an image of 2x2 tokens


def _joint(layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the (B, T) mask of the text, the (B, S) positions, and what sees what (B, S, S)."""
    text = key_mask(layout)
    assert text is not None
    valid = torch.cat([text, text.new_ones(BATCH, 1 + IMAGE)], dim=1)
    sees = torch.ones(valid.shape[1], valid.shape[1], dtype=torch.bool).tril()
    sees[-IMAGE:] = True
    sees = torch.where(valid[:, :, None], sees & valid[:, None], True)
    return text, (valid.cumsum(-1) - 1).clamp(min=0), sees


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, positions, sees = _joint(layout)
    words = torch.arange(1, TEXT + 1).expand(BATCH, TEXT)
    return {
        "hidden_states": randn(BATCH, 4, 20, 16),
        "timestep": timesteps(),
        "input_ids": torch.where(text, words, int(pads)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": sees.float(),
        "position_ids": positions,
    }


def _edit_inputs(layout: Layout, pads: float) -> Inputs:
    inputs = _inputs(layout, pads)
    inputs["attention_mask"][:, slice(*WITHIN), slice(*WITHIN)] = 1.0
    return {
        **inputs,
        "input_img_latents": [randn(1, 4, 4, 4, seed=2 + i) for i in range(BATCH)],
        "input_image_sizes": {i: [WITHIN] for i in range(BATCH)},
    }


CONFIG = {
    "hidden_size": 2 * HEAD_DIM,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "num_layers": 2,
    "pad_token_id": 0,
    "vocab_size": 16,
    "rope_scaling": dict.fromkeys(("short_factor", "long_factor"), [1.0] * (HEAD_DIM // 2)),
    "pos_embed_max_size": 10,
    "time_step_dim": 64,
}

CASES = (
    Case(
        name="omnigen",
        model=OmniGenTransformer2DModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=("all_true", "right", "left", "ragged", "gap"),
    ),
    Case(
        name="omnigen_edit",
        model=OmniGenTransformer2DModel,
        config=CONFIG,
        inputs=_edit_inputs,
        layouts=("all_true", "left"),
    ),
)
