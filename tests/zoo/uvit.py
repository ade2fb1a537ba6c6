"""UVit2DModel of aMUSEd: text cross attention in every block, without a mask.

Its forward has no `return_dict` and returns a bare tensor.
"""

from __future__ import annotations

import torch
from diffusers import UVit2DModel

from .case import BATCH, TEXT, Case, Inputs, Layout, randn

VOCABULARY = 32


class UVit(UVit2DModel):
    """Takes `return_dict` as every other model does."""

    def forward(self, *, return_dict: bool, **inputs: object) -> tuple[torch.Tensor]:
        """Return the logits, in a tuple."""
        return (super().forward(**inputs),)


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "input_ids": torch.arange(BATCH * 16).reshape(BATCH, 4, 4) % VOCABULARY,
        "encoder_hidden_states": randn(BATCH, TEXT, 16, seed=1),
        "pooled_text_emb": randn(BATCH, 16, seed=2),
        "micro_conds": torch.tensor([[512.0, 512.0, 0.0, 0.0, 6.0]]).repeat(BATCH, 1),
    }


CASES = (
    Case(
        name="uvit",
        model=UVit,
        config={
            "hidden_size": 128,
            "cond_embed_dim": 16,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "encoder_hidden_size": 16,
            "vocab_size": VOCABULARY + 1,
            "codebook_size": VOCABULARY,
            "in_channels": 32,
            "block_out_channels": 128,
            "num_res_blocks": 1,
            "downsample": True,
            "upsample": True,
            "block_num_heads": 2,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "sample_size": 4,
        },
        inputs=_inputs,
    ),
)
