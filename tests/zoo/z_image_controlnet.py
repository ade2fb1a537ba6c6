"""Z-Image's ControlNet: ragged items as in Z-Image, but always with a mask."""

from __future__ import annotations

import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from torch import nn

from .case import BATCH, Case, Inputs, Layout, randn
from .z_image import CONFIG, MULTIPLE, inputs


class ControlNet(ZImageControlNetModel):
    """Takes `return_dict` as every other model does."""

    def forward(self, *, return_dict: bool, **inputs: object) -> dict[int, torch.Tensor]:
        """Return a residual for each of the transformer's layers that get one."""
        return super().forward(**inputs)


def share_embedders(controlnet: nn.Module) -> None:
    """Give the ControlNet what it shares with a transformer, as diffusers' pipeline does."""
    ZImageControlNetModel.from_transformer(controlnet, ZImageTransformer2DModel(**CONFIG))


def _inputs(layout: Layout, pads: float) -> Inputs:
    control = list(randn(BATCH, 4, 1, 8, 8, seed=3))
    return {**inputs(layout, pads), "control_context": control}


def shared_rows(returned: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return the residuals of tokens, up to the end of the shorter item."""
    return torch.stack(list(returned.values()))[:, :, : 2 * MULTIPLE]


CASES = (
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
        inputs=_inputs,
        layouts=("none", "ragged"),
        prepare=share_embedders,
        pick=shared_rows,
        pads=False,
    ),
)
