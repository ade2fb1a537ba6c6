"""Z-Image: takes lists, so a caller passes no mask; ragged items are padded on the right."""

from __future__ import annotations

import torch
from diffusers import ZImageTransformer2DModel

from .case import BATCH, Case, Inputs, Layout, randn, timesteps

# Lengths are padded to a multiple of 32 with a learned token, which is attended to.
LENGTHS = {"none": (8, 8), "ragged": (40, 8)}


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "x": list(randn(BATCH, 4, 1, 8, 8)),
        "t": timesteps(),
        "cap_feats": [randn(n, 16, seed=1 + i) for i, n in enumerate(LENGTHS[layout])],
    }


CASES = (
    Case(
        name="z_image",
        model=ZImageTransformer2DModel,
        config={
            "in_channels": 4,
            "dim": 256,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [32, 48, 48],
            "axes_lens": [128, 32, 32],
        },
        inputs=_inputs,
        layouts=("none", "ragged"),
        pick=lambda returned: torch.stack(list(returned[0])),  # one image per sample
        pads=False,
    ),
)
