"""Lumina-Next: bool masks expanded to [B, H, Sq, Sk], rebuilt in every layer.

That of the self-attention is all true, that of the cross attention hides padded text. A text mask
is required. Pipelines scale the self-attention by the length of the sequence.
"""

from __future__ import annotations

from diffusers import LuminaNextDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import nn

from .case import BATCH, Case, Inputs, Layout, prompt, randn, timesteps

HEAD_DIM = 72


def zero_pad_token(model: nn.Module) -> None:
    """Clear a parameter that is never used and starts as whatever lay in memory."""
    nn.init.zeros_(model.pad_token)


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "timestep": timesteps(),
        "encoder_hidden_states": text,
        "encoder_mask": mask,
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(HEAD_DIM, 8, 8),
        "cross_attention_kwargs": {"base_sequence_length": 8},
    }


CASES = (
    Case(
        name="lumina_next",
        model=LuminaNextDiT2DModel,
        config={
            "sample_size": 8,
            "hidden_size": 2 * HEAD_DIM,
            "num_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": 16,
        },
        inputs=_inputs,
        layouts=("all_true", "right", "left", "ragged", "gap"),
        prepare=zero_pad_token,
    ),
)
