"""Z-Image: lists, so a caller passes no mask; only ragged items have one, padded on the right."""

from __future__ import annotations

import torch
from diffusers import ZImageTransformer2DModel
from torch import nn

from .case import BATCH, Case, Inputs, Layout, randn, timesteps

MULTIPLE = 32  # lengths are padded to a multiple of it with a learned token, which is attended to
LENGTHS = {"none": (40, 40), "ragged": (40, 8)}


def inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "x": list(randn(BATCH, 4, 1, 8, 8)),
        "t": timesteps(),
        "cap_feats": [randn(n, 16, seed=1 + i) for i, n in enumerate(LENGTHS[layout])],
    }


def zero_pad_tokens(transformer: nn.Module) -> None:
    """Diffusers 0.36 leaves them as the memory was."""
    nn.init.zeros_(transformer.x_pad_token)
    nn.init.zeros_(transformer.cap_pad_token)


CONFIG = {
    "in_channels": 4,
    "dim": 256,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [32, 48, 48],
    "axes_lens": [128, 32, 32],
}

CASES = (
    Case(
        name="z_image",
        model=ZImageTransformer2DModel,
        config=CONFIG,
        inputs=inputs,
        layouts=("none", "ragged"),
        prepare=zero_pad_tokens,
        pick=lambda returned: torch.stack(list(returned[0])),  # one image per sample
        pads=False,
    ),
)
