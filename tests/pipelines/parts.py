"""Tokenizers, encoders and VAEs of a few thousand parameters, which the families share.

The encoders compute attention by themselves ("eager"), so that what `zoo.watch` sees is diffusers'.
"""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from zoo.case import randn

TEXT = 16
"""Tokens to which prompts are padded; every letter is one."""

PROMPTS = ["cat", "a dog at sea"]
"""Of different length, and both shorter than that."""

DIGITS = Path(__file__).parents[2] / "examples" / "digits"


def clip_tokenizer() -> CLIPTokenizer:
    """Knows lower-case letters; the end token pads, as in CLIP itself."""
    letters = string.ascii_lowercase
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=TEXT)


def clip(
    width: int, kind: type[PreTrainedModel] = CLIPTextModel, projected: int | None = None
) -> PreTrainedModel:
    """Text encoder with states of `width`; `kind` may be the one with a projection."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer()),
            hidden_size=width,
            intermediate_size=width,
            projection_dim=projected or width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            attn_implementation="eager",
        )
    )


def projected_clip(width: int, projected: int) -> PreTrainedModel:
    """Text encoder that also gives a pooled vector of size `projected`."""
    return clip(width, CLIPTextModelWithProjection, projected)


def t5_tokenizer() -> T5Tokenizer:
    """Knows lower-case letters and the space."""
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    pieces = [(piece, -1.0) for piece in "▁" + string.ascii_lowercase]
    return T5Tokenizer(vocab=special + pieces, extra_ids=0, model_max_length=TEXT)


def t5(width: int) -> T5EncoderModel:
    """Text encoder with states of `width`."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=width,
            d_kv=8,
            d_ff=width,
            num_layers=2,
            num_heads=2,
            attn_implementation="eager",
        )
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    """That of the digits: it knows the words of Qwen-Image's template, and all letters."""
    return Qwen2Tokenizer.from_pretrained(DIGITS / "tokenizer")


def qwen() -> Qwen2_5_VLForConditionalGeneration:
    """That of the digits, too, whose weights are random; states of 64."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        DIGITS / "text_encoder", attn_implementation="eager"
    )


def vision(projected: int) -> CLIPVisionModelWithProjection:
    """Image encoder for image prompts."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            projection_dim=projected,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            attn_implementation="eager",
        )
    )


def image_processor() -> CLIPImageProcessor:
    """What makes the image encoder's input out of a picture."""
    size = {"height": 8, "width": 8}
    return CLIPImageProcessor(size=size, crop_size=size)


def picture() -> Image.Image:
    """A picture to prompt with."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def image_projection(image_width: int, text_width: int) -> dict[str, torch.Tensor]:
    """The part of an IP-Adapter's state dict that makes four tokens out of an encoded picture."""
    return {
        "proj.weight": randn(4 * text_width, image_width) / 4,
        "proj.bias": randn(4 * text_width),
        "norm.weight": torch.ones(text_width),
        "norm.bias": torch.zeros(text_width),
    }


def vae(channels: int) -> AutoencoderKL:
    """A VAE that keeps the size of the picture, with one attention layer on each side."""
    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, shift_factor=0.0
    )
