"""Cosmos: (B, 1, 1, K) bool masks of the text in cross attention, as the caller gives them.

Pipelines give none. With image context (Predict 2.5, Transfer 2.5) a layer makes two cross
attention calls, and diffusers itself fails if there is a mask. Cosmos 3 packs one request: causal
attention of the text, then attention of all that is generated to [text, generated], Sq < Sk, both
with grouped heads and without a mask.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
from diffusers import Cosmos3OmniTransformer, CosmosControlNetModel, CosmosTransformer3DModel
from diffusers.models.controlnets import controlnet_cosmos
from torch.nn import functional

from .case import ANY_MASK, BATCH, TEXT, Case, Inputs, Layout, prompt, randn, timesteps

HEADS = 2
HEAD_DIM = 128
WIDTH = HEADS * HEAD_DIM
FRAMES = 2
IMAGE_TOKENS = 3

PACKED_IMAGE = 16  # tokens of Cosmos 3's image

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
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 4, FRAMES, 8, 8),
        "timestep": timesteps(),
        "encoder_hidden_states": text,
        "attention_mask": mask,
        "fps": 16,
    }


def _video_to_world_inputs(layout: Layout, pads: float) -> Inputs:
    condition = torch.zeros(BATCH, 1, FRAMES, 8, 8)
    condition[:, :, 0] = 1.0
    of_frames = torch.tensor([0.1, 1.0])  # the first one is given
    return {
        **_inputs(layout, pads),
        "condition_mask": condition,
        "timestep": timesteps()[:, None, None, None, None] * of_frames[:, None, None],
    }


def _context() -> tuple[torch.Tensor, torch.Tensor]:
    return randn(BATCH, TEXT, 12, seed=1), randn(BATCH, IMAGE_TOKENS, 16, seed=2)


def _image_context_inputs(layout: Layout, pads: float) -> Inputs:
    return {**_inputs("none", pads), "encoder_hidden_states": _context()}


def _controlnet_inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "controls_latents": randn(BATCH, 4, FRAMES, 8, 8),
        "latents": randn(BATCH, 4, FRAMES, 8, 8, seed=3),
        "timestep": timesteps(),
        "encoder_hidden_states": _context(),
        "condition_mask": torch.ones(BATCH, 1, FRAMES, 8, 8),
        "padding_mask": torch.zeros(1, 1, 8, 8),
    }


def _packed_inputs(layout: Layout, pads: float) -> Inputs:
    length = TEXT + PACKED_IMAGE
    image = torch.arange(TEXT, length)
    return {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.arange(length).expand(3, -1),
        "und_len": TEXT,
        "sequence_length": length,
        "vision_tokens": [randn(1, 4, 1, 8, 8)],
        "vision_token_shapes": [(1, 4, 4)],
        "vision_sequence_indexes": image,
        # One row early: nothing but the text's last row sees the last of the causal calls.
        "vision_mse_loss_indexes": image - 1,
        "vision_timesteps": torch.full((PACKED_IMAGE,), 500.0),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


SHARED = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "mlp_ratio": 1.0,
    "adaln_lora_dim": 4,
    "max_size": (4, 16, 16),
    "extra_pos_embed_type": None,  # the learnable one fails in float64
}
CONFIG = {
    **SHARED,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "text_embed_dim": 16,
    "concat_padding_mask": False,  # needs torchvision
}
IMAGE_CONTEXT = {
    **SHARED,
    "text_embed_dim": 16,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 12,
    "encoder_hidden_states_channels": 16,
    "img_context_dim_in": 16,
    "img_context_dim_out": WIDTH,
}

CASES = (
    Case(
        name="cosmos",
        model=CosmosTransformer3DModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
    Case(
        name="cosmos_video_to_world",
        model=CosmosTransformer3DModel,
        config={**CONFIG, "in_channels": 5},
        inputs=_video_to_world_inputs,
        layouts=("none", "ragged"),
    ),
    Case(
        name="cosmos_image_context",
        model=CosmosTransformer3DModel,
        config={**CONFIG, **IMAGE_CONTEXT, "img_context_num_tokens": IMAGE_TOKENS},
        inputs=_image_context_inputs,
    ),
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
        inputs=_controlnet_inputs,
        pick=lambda returned: torch.cat(returned[0]),  # the residuals of all blocks
    ),
    Case(
        name="cosmos3",
        model=Cosmos3OmniTransformer,
        config={
            "head_dim": HEAD_DIM,
            "hidden_size": 64,
            "intermediate_size": 64,
            "latent_channel": 4,
            "latent_patch_size": 2,
            "patch_latent_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "vocab_size": TEXT,
        },
        inputs=_packed_inputs,
        pick=lambda returned: returned[0][0],  # one image, no sound, no action
    ),
)
