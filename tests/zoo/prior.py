"""PriorTransformer as in unCLIP and Kandinsky: [text, pads, 4 more tokens], causal under a mask.

The mask is additive, [B * H, S, S]: -1e4 for padding and -1e4 above the diagonal, -2e4 where both.
Without a text mask nothing is causal. CLIP pads on the right. Left padding is left out: it gives
rows that see no key at finite values, over which the default averages, and so no row can be packed.
"""

from __future__ import annotations

from diffusers import PriorTransformer

from .case import BATCH, TEXT, Case, Inputs, Layout, prompt, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 16),
        "timestep": timesteps(1000),
        "proj_embedding": randn(BATCH, 16, seed=2),
        "encoder_hidden_states": text,
        "attention_mask": mask,
    }


CASES = (
    Case(
        name="prior",
        model=PriorTransformer,
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "num_layers": 2,
            "embedding_dim": 16,
            "num_embeddings": TEXT,
        },
        inputs=_inputs,
        layouts=("none", "all_true", "right", "ragged", "gap"),
    ),
)
