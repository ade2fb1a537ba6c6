"""RFD4-Proteina: the mask is a real bias, made of the pairs of tokens, with a value for every head.

Where a query or a key is padded the bias is -1e4 instead, so a padded row sees all keys alike; it
is zeroed afterwards. With nothing padded the bias remains: there is no layout without it.
"""

from __future__ import annotations

import torch
from diffusers import RFD4ProteinaTransformer

from .case import BATCH, TEXT, Case, Inputs, Layout, Refusal, key_mask, prompt, randn, timesteps

TOKENS = TEXT
LATENTS = 8


def _inputs(layout: Layout, pads: float) -> Inputs:
    coordinates, mask = prompt(layout, 3, pads, length=TOKENS)
    position = torch.arange(TOKENS)
    apart = (position[:, None] - position).abs().expand(BATCH, -1, -1)
    latents = randn(BATCH, TOKENS, LATENTS, seed=2) + pads * (~mask).unsqueeze(-1)
    return {
        "bb_ca": coordinates,
        "local_latents": latents,
        "bb_ca_time": timesteps(),
        "local_latents_time": timesteps(),
        "padding_mask": mask,
        "token_type": (position % 7).expand(BATCH, -1),
        "conditioning": {
            "is_in_context_conditioning": ~key_mask("all_true", TOKENS),
            "supports_local_latent": key_mask("all_true", TOKENS),
            "token_bond_path_length": apart,
            "molecule_iid": (position // 5).expand(BATCH, -1),
        },
    }


CASES = (
    Case(
        name="rfd4_proteina",
        model=RFD4ProteinaTransformer,
        config={
            "nlayers": 2,  # pairs are updated between them
            "token_dim": 128,
            "nheads": 2,
            "dim_cond": 16,
            "pair_repr_dim": 16,
            "latent_dim": LATENTS,
            "token_type_emb_dim": 8,
            "t_emb_dim": 16,
            "seq_sep_dim": 8,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("token_bond_path_length", "molecule_idx_pair"),
            "feats_pair_cond": ("time_emb_bb_ca", "time_emb_local_latents"),
            "tri_mult_c": 16,
            "num_sequence_classes": 8,
        },
        inputs=_inputs,
        layouts=("all_true", "right", "left", "ragged", "gap"),
        pick=lambda returned: torch.cat(returned, dim=-1),
        refusal=Refusal(layer=r"mha$", reason=r"bias"),
    ),
)
