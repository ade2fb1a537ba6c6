"""Cosmos Transfer 2.5's ControlNet: two cross attention calls in a layer, without a mask."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
from diffusers import CosmosControlNetModel
from diffusers.models.controlnets import controlnet_cosmos
from torch.nn import functional

from .case import BATCH, Case, Inputs, Layout, randn, timesteps
from .cosmos import FRAMES, IMAGE_CONTEXT, WIDTH, image_context

TRANSFORMS = SimpleNamespace(
    InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    functional=SimpleNamespace(
        resize=lambda mask, size, interpolation: functional.interpolate(
            mask, size, mode=interpolation
        )
    ),
)
"""What the ControlNet uses of torchvision, which is not among the test dependencies."""


class ControlNet(CosmosControlNetModel):
    """The ControlNet, able to resize its padding mask without torchvision."""

    def forward(self, **inputs: object) -> tuple[list[torch.Tensor]]:
        with mock.patch.object(controlnet_cosmos, "transforms", TRANSFORMS, create=True):
            return super().forward(**inputs)


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "controls_latents": randn(BATCH, 4, FRAMES, 8, 8),
        "latents": randn(BATCH, 4, FRAMES, 8, 8, seed=3),
        "timestep": timesteps(),
        "encoder_hidden_states": image_context(),
        "condition_mask": torch.ones(BATCH, 1, FRAMES, 8, 8),
        "padding_mask": torch.zeros(1, 1, 8, 8),
    }


CASES = (
    Case(
        name="cosmos_controlnet",
        model=ControlNet,
        config={
            **IMAGE_CONTEXT,
            "n_controlnet_blocks": 2,
            "model_channels": WIDTH,
            "in_channels": 6,
            "latent_channels": 6,
        },
        inputs=_inputs,
        pick=lambda returned: torch.cat(returned[0]),  # the residuals of all blocks
    ),
)
