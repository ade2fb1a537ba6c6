"""Z-Image and its ControlNet: lists, so a caller passes no mask; ragged items are padded right.

The transformer passes no mask where all items are of one length; the ControlNet always passes one.
"""

from __future__ import annotations

import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from torch import nn

from .case import BATCH, Case, Inputs, Layout, randn, timesteps

MULTIPLE = 32  # lengths are padded to a multiple of it with a learned token, which is attended to
LENGTHS = {"none": (8, 8), "ragged": (40, 8)}


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "x": list(randn(BATCH, 4, 1, 8, 8)),
        "t": timesteps(),
        "cap_feats": [randn(n, 16, seed=1 + i) for i, n in enumerate(LENGTHS[layout])],
    }


class ControlNet(ZImageControlNetModel):
    """Takes `return_dict` as every other model does."""

    def forward(self, *, return_dict: bool, **inputs: object) -> dict[int, torch.Tensor]:
        """Return a residual for each of the transformer's layers that get one."""
        return super().forward(**inputs)


def share_embedders(controlnet: nn.Module) -> None:
    """Give the ControlNet what it shares with a transformer, as diffusers' pipeline does."""
    ZImageControlNetModel.from_transformer(controlnet, ZImageTransformer2DModel(**CONFIG))


def _controlnet_inputs(layout: Layout, pads: float) -> Inputs:
    control = list(randn(BATCH, 4, 1, 8, 8, seed=3))
    return {**_inputs(layout, pads), "control_context": control}


def shared_rows(returned: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return the residuals of tokens, up to the end of the shorter item."""
    return torch.stack(list(returned.values()))[:, :, : 2 * MULTIPLE]


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
        inputs=_inputs,
        layouts=("none", "ragged"),
        pick=lambda returned: torch.stack(list(returned[0])),  # one image per sample
        pads=False,
    ),
    Case(
        name="z_image_controlnet",
        model=ControlNet,
        config={
            "control_layers_places": [0],
            "control_refiner_layers_places": [0],
            "control_in_dim": 4,
            "add_control_noise_refiner": "control_noise_refiner",
            "dim": 256,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
        },
        inputs=_controlnet_inputs,
        layouts=("none", "ragged"),
        prepare=share_embedders,
        pick=shared_rows,
        pads=False,
    ),
)
