"""diffusers models at their published sizes, with random weights and inputs.

Time, memory and routes do not depend on weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

Config = dict[str, Any]
Inputs = dict[str, Any]

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """What goes in: samples, image or video in patches, and text tokens."""

    batch: int
    frames: int
    height: int
    width: int
    text: int

    @property
    def image(self) -> int:
        """Image or video tokens."""
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Model:
    """A transformer as it was published, and what it is measured on."""

    name: str
    cls: type[nn.Module]
    config: Config
    size: Size
    inputs: Callable[[Config, Size], Inputs]
    """All but the text."""
    text_width: str
    """Entry of the configuration."""
    small: Config
    """What makes it tiny, in place of published values."""
    shares: tuple[float | None, ...] = (None,)
    """Shares of valid text; None: no mask."""
    mask_name: str = ""
    """Argument that takes the mask of the text."""
    joint: bool = True
    """Text and image attend together; else the image attends to the text in layers of its own."""
    joint_mask: bool = False
    """That mask is of [text, image]."""
    depths: tuple[str, ...] = ("num_layers",)
    """Entries of the configuration that count blocks."""
    layers: int | None = None
    """At most so many blocks, unless others are asked for."""


def patches(config: Config, size: Size) -> Inputs:
    """Qwen-Image's image, in patches, with its shape."""
    return {
        "hidden_states": torch.randn(size.batch, size.image, config["in_channels"]),
        "timestep": torch.full((size.batch,), 0.5),
        "img_shapes": [(size.frames, size.height, size.width)] * size.batch,
    }


def placed_patches(config: Config, size: Size) -> Inputs:
    """Flux' image, in patches, with positions."""
    axes = torch.arange(size.frames), torch.arange(size.height), torch.arange(size.width)
    return {
        "hidden_states": torch.randn(size.batch, size.image, config["in_channels"]),
        "timestep": torch.full((size.batch,), 0.5),
        "guidance": torch.full((size.batch,), 3.5),
        "pooled_projections": torch.randn(size.batch, config["pooled_projection_dim"]),
        "img_ids": torch.cartesian_prod(*axes).to(DTYPE),
        "txt_ids": torch.zeros(size.text, 3),
    }


def placed_patches_alone(config: Config, size: Size) -> Inputs:
    """Chroma's image: as Flux', without a summary of the text."""
    inputs = placed_patches(config | {"pooled_projection_dim": 1}, size)
    del inputs["pooled_projections"], inputs["guidance"]
    return inputs


def video_of_three_texts(config: Config, size: Size) -> Inputs:
    """HunyuanVideo 1.5 without an image and without glyphs to draw: both are padding throughout."""
    glyphs, image_tokens = min(size.text, 256), 729
    latents = (size.batch, config["in_channels"], size.frames, size.height, size.width)
    return {
        "hidden_states": torch.randn(latents),
        "timestep": torch.full((size.batch,), 500.0),
        "encoder_hidden_states_2": torch.randn(size.batch, glyphs, config["text_embed_2_dim"]),
        "encoder_attention_mask_2": torch.zeros(size.batch, glyphs, dtype=torch.bool),
        "image_embeds": torch.zeros(size.batch, image_tokens, config["image_embed_dim"]),
    }


def image(config: Config, size: Size) -> Inputs:
    """Latents in patches of 2 x 2."""
    shape = (size.batch, config["in_channels"], 2 * size.height, 2 * size.width)
    return {"hidden_states": torch.randn(shape), "timestep": torch.full((size.batch,), 500)}


def video(config: Config, size: Size) -> Inputs:
    """The same, for all frames."""
    shape = (size.batch, config["in_channels"], size.frames, 2 * size.height, 2 * size.width)
    return {"hidden_states": torch.randn(shape), "timestep": torch.full((size.batch,), 500)}


def pooled_image(config: Config, size: Size) -> Inputs:
    """The same, with a summary of the text."""
    pooled = torch.randn(size.batch, config["pooled_projection_dim"])
    return image(config, size) | {"pooled_projections": pooled}


def conditioned_image(config: Config, size: Size) -> Inputs:
    """The same, without the conditions that it may have."""
    conditions = {"resolution": None, "aspect_ratio": None}
    return image(config, size) | {"added_cond_kwargs": conditions}


def latents_with_sizes(config: Config, size: Size) -> Inputs:
    """SDXL's latents, with a summary of the text and the sizes that it is conditioned on."""
    width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    added = {"text_embeds": torch.randn(size.batch, width), "time_ids": torch.ones(size.batch, 6)}
    inputs = image(config, size)
    return {
        "sample": inputs["hidden_states"],
        "timestep": inputs["timestep"],
        "added_cond_kwargs": added,
    }


MODELS = (
    Model(
        "flux",  # FLUX.1-dev, 1024 x 1024
        FluxTransformer2DModel,
        {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
        Size(1, 1, 64, 64, text=512),
        placed_patches,
        text_width="joint_attention_dim",
        small={"joint_attention_dim": 32, "pooled_projection_dim": 32},
        depths=("num_layers", "num_single_layers"),
    ),
    Model(
        "qwenimage",  # Qwen-Image, 1024 x 1024
        QwenImageTransformer2DModel,
        {
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "axes_dims_rope": (16, 56, 56),
        },
        Size(2, 1, 64, 64, text=512),
        patches,
        text_width="joint_attention_dim",
        small={"joint_attention_dim": 32},
        shares=(None, 1.0, 0.5, 0.1),
        mask_name="encoder_hidden_states_mask",
        layers=20,
    ),
    Model(
        "chroma",  # Chroma1-HD, 1024 x 1024
        ChromaTransformer2DModel,
        {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "axes_dims_rope": (16, 56, 56),
            "approximator_num_channels": 64,
            "approximator_hidden_dim": 5120,
            "approximator_layers": 5,
        },
        Size(1, 1, 64, 64, text=512),
        placed_patches_alone,
        text_width="joint_attention_dim",
        small={
            "joint_attention_dim": 32,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        shares=(0.1,),
        mask_name="attention_mask",
        joint_mask=True,
        depths=("num_layers", "num_single_layers"),
    ),
    Model(
        "hunyuanvideo15",  # HunyuanVideo 1.5 T2V, 848 x 480, 121 frames
        HunyuanVideo15Transformer3DModel,
        {
            "in_channels": 65,
            "out_channels": 32,
            "num_attention_heads": 16,
            "attention_head_dim": 128,
            "num_layers": 54,
            "num_refiner_layers": 2,
            "text_embed_dim": 3584,
            "text_embed_2_dim": 1472,
            "image_embed_dim": 1152,
            "task_type": "t2v",
        },
        Size(1, 31, 30, 53, text=1000),
        video_of_three_texts,
        text_width="text_embed_dim",
        small={
            "text_embed_dim": 32,
            "text_embed_2_dim": 16,
            "image_embed_dim": 16,
            "num_refiner_layers": 1,
        },
        shares=(0.05,),
        mask_name="encoder_attention_mask",
        layers=20,
    ),
    Model(
        "wan",  # Wan 2.1 T2V 1.3B, 832 x 480, 81 frames
        WanTransformer3DModel,
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": 8960,
            "num_layers": 30,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
        },
        Size(1, 21, 30, 52, text=512),
        video,
        text_width="text_dim",
        joint=False,
        small={"text_dim": 32, "ffn_dim": 64},
    ),
    Model(
        "sd3",  # Stable Diffusion 3.5 medium, 1024 x 1024
        SD3Transformer2DModel,
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        Size(2, 1, 64, 64, text=333),
        pooled_image,
        text_width="joint_attention_dim",
        small={
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
        },
    ),
    Model(
        "sdxl",  # Stable Diffusion XL, 1024 x 1024
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "in_channels": 4,
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        Size(2, 1, 64, 64, text=77),
        latents_with_sizes,
        text_width="cross_attention_dim",
        joint=False,
        small={
            "block_out_channels": (32, 64, 64),
            "transformer_layers_per_block": 1,
            "attention_head_dim": (2, 4, 4),
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
        depths=(),
    ),
    Model(
        "pixart",  # PixArt-Sigma XL, 1024 x 1024
        PixArtTransformer2DModel,
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "sample_size": 128,
            "interpolation_scale": 2,
            "caption_channels": 4096,
            "use_additional_conditions": False,
        },
        Size(2, 1, 64, 64, text=300),
        conditioned_image,
        text_width="caption_channels",
        joint=False,
        small={"caption_channels": 32},
        shares=(None, 20 / 300),
        mask_name="encoder_attention_mask",
    ),
)


def made_small(model: Model, heads: int = 2) -> Model:
    """The same in a size that a CPU computes at once."""
    depths = dict.fromkeys(model.depths, 2)
    widths = {}
    if "num_attention_heads" in model.config:
        head_dim = model.config["attention_head_dim"]
        published = model.config["num_attention_heads"] * head_dim
        widths = {n: heads * head_dim for n, width in model.config.items() if width == published}
        widths["num_attention_heads"] = heads
    frames = min(model.size.frames, 2)
    size = replace(model.size, frames=frames, height=4, width=4, text=model.size.text // 8)
    return replace(model, config=model.config | model.small | widths | depths, size=size)


def made_shallow(model: Model, layers: int | None) -> Model:
    """The same with fewer blocks, where so many were asked for."""
    most = layers or model.layers
    depths = {name: min(most or model.config[name], model.config[name]) for name in model.depths}
    return replace(model, config=model.config | depths)


@contextmanager
def defaults(device: str) -> Iterator[None]:
    """Tensors are made on the device and in half precision, as diffusers does when it loads."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(model: Model, device: str) -> nn.Module:
    """The model with random weights; nothing hides attention from what comes out."""
    torch.manual_seed(0)
    with defaults(device):
        network = model.cls(**model.config).eval().requires_grad_(False)
    in_float32 = network._keep_in_fp32_modules or []
    for name, parameter in network.named_parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
        if any(part in in_float32 for part in name.split(".")):
            parameter.data = parameter.float()
    return network


def make_inputs(model: Model, share: float | None, device: str) -> Inputs:
    """One forward's arguments."""
    torch.manual_seed(1)
    with defaults(device):
        inputs = model.inputs(model.config, model.size)
        text = (model.size.batch, model.size.text, model.config[model.text_width])
        inputs["encoder_hidden_states"] = torch.randn(text)
        if share is not None:
            mask = text_mask(model.size, share)
            image = mask.new_ones(model.size.batch, model.size.image)
            joint = torch.cat([mask, image], dim=1)
            inputs[model.mask_name] = joint if model.joint_mask else mask
    return inputs


def text_mask(size: Size, share: float) -> Tensor:
    """(B, text) bool, valid tokens first; samples differ by up to half of the share."""
    spread = torch.ones(size.batch) if share == 1 else torch.linspace(0.5, 1.5, size.batch)
    lengths = (size.text * share * spread.float()).round().clamp(1, size.text)
    return torch.arange(size.text) < lengths[:, None]


def forward_of(network: Callable[..., Any]) -> Callable[[Inputs], Tensor]:
    """A forward that no plan was made for."""

    def run(inputs: Inputs) -> Tensor:
        masks = {name: mask.clone() for name, mask in inputs.items() if name.endswith("_mask")}
        return network(**inputs | masks, return_dict=False)[0]

    return run
