"""The shipped digits pipeline: small, loaded like any other, readable, and the same on FA3."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImagePipeline
from digits_task import (
    MODEL_DIR,
    TEMPLATES,
    draw,
    draw_in_turn,
    fit_reader,
    prompt_for,
    share_named,
)
from loading import load_pipeline
from releases import QWENIMAGE_MASKS, needs
from torch import nn
from zoo.budget import assert_within_budget

from diffusers_fa3 import coverage, disable_fa3, enable_fa3

LARGEST = 3_000_000  # bytes, all files together
READABLE = 0.9

every_attention = pytest.mark.parametrize("attention", ["default", "FA3"])


@pytest.fixture(scope="module")
def shipped() -> DiffusionPipeline:
    pipe = load_pipeline(MODEL_DIR)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(shipped: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    yield shipped
    disable_fa3(shipped)


def test_all_of_it_is_small() -> None:
    assert sum(file.stat().st_size for file in MODEL_DIR.rglob("*") if file.is_file()) < LARGEST


def test_weights_are_safetensors_only() -> None:
    files = [file for file in MODEL_DIR.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".md", ".safetensors"}


def test_card_names_source_and_licence_of_the_data() -> None:
    card = (MODEL_DIR / "README.md").read_text()
    assert "Optical Recognition of Handwritten Digits" in card
    assert "E. Alpaydin and C. Kaynak" in card
    assert "CC BY 4.0" in card


def test_plain_from_pretrained_loads_a_stock_pipeline_in_float32() -> None:
    pipe = DiffusionPipeline.from_pretrained(MODEL_DIR)
    assert type(pipe) is QwenImagePipeline
    for module in (pipe.vae, pipe.text_encoder, pipe.transformer):
        assert {weight.dtype for weight in module.parameters()} == {torch.float32}


def test_templates_differ_in_length(pipe: DiffusionPipeline) -> None:
    _, mask = pipe.encode_prompt([prompt_for(7, i) for i in range(len(TEMPLATES))])
    assert len(set(mask.sum(dim=1).tolist())) > 5


@every_attention
def test_a_reader_of_real_digits_names_the_drawn_ones(
    pipe: DiffusionPipeline, attention: str
) -> None:
    needs(*QWENIMAGE_MASKS)
    if attention == "FA3":
        enable_fa3(pipe, kernel="reference", fallback="error")
    images, asked = draw_in_turn(pipe, 200)
    assert share_named(fit_reader(), images, asked) >= READABLE


def test_a_batch_of_prompts_is_served_with_its_mask(pipe: DiffusionPipeline) -> None:
    needs(*QWENIMAGE_MASKS)
    enable_fa3(pipe, kernel="reference")
    draw(pipe, ["seven", "a picture of the digit three"], seeds=[0, 1], steps=2)
    report = coverage(pipe).to_dict()
    layers = len(pipe.transformer.transformer_blocks)
    assert report["fallbacks"] == 0
    assert [layer["calls"] for layer in report["layers"]] == [{"packed": 2}] * layers


def test_without_the_mask_the_padded_pictures_change(pipe: DiffusionPipeline) -> None:
    needs(*QWENIMAGE_MASKS)
    prompts = ["seven", prompt_for(3, len(TEMPLATES) - 1)]
    right = draw(pipe, prompts, seeds=[0, 1])

    def drop_mask(module: nn.Module, args: tuple[()], kwargs: dict[str, object]) -> object:
        return args, kwargs | {"encoder_hidden_states_mask": None}

    hook = pipe.transformer.register_forward_pre_hook(drop_mask, with_kwargs=True)
    wrong = draw(pipe, prompts, seeds=[0, 1])
    hook.remove()
    changed = np.abs(wrong - right).max(axis=(1, 2, 3))
    assert changed[0] > 0.05
    assert changed[1] < 1e-5  # the longest prompt has no padding


def test_a_prompt_in_a_batch_gives_what_it_gives_alone(pipe: DiffusionPipeline) -> None:
    needs(*QWENIMAGE_MASKS)
    prompts = [prompt_for(digit, digit) for digit in range(10)]

    def batch(pipe: DiffusionPipeline) -> torch.Tensor:
        return torch.from_numpy(draw(pipe, prompts, seeds=range(10)))

    def one_by_one(pipe: DiffusionPipeline) -> torch.Tensor:
        alone = [draw(pipe, [prompt], seeds=[seed]) for seed, prompt in enumerate(prompts)]
        return torch.from_numpy(np.concatenate(alone))

    exact_pipe = load_pipeline(MODEL_DIR, dtype=torch.float64)
    exact_pipe.set_progress_bar_config(disable=True)
    exact, default = one_by_one(exact_pipe), one_by_one(pipe)
    enable_fa3(pipe, kernel="reference", fallback="error")
    assert_within_budget(one_by_one(pipe), default, exact)
    assert_within_budget(batch(pipe), default, exact)
