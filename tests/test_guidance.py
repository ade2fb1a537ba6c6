"""Guidance that replaces attention for a while also replaces it in switched layers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPAGPipeline
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from switching import (
    BY_NAME,
    assert_on_the_kernel,
    assert_same_objects,
    expect,
    processors,
    run,
)
from tiny import vae
from torch import nn
from torch.overrides import TorchFunctionMode
from zoo import Layout
from zoo.budget import assert_within_budget

from diffusers_fa3 import FallbackWarning, coverage, enable_fa3


def without_attention_in_a_block(model: nn.Module) -> nn.Module:
    """Perturbed-attention guidance in one block: attention returns v there."""
    unet = hasattr(model, "down_blocks")
    blocks = "down_blocks.0.attentions.0.transformer_blocks" if unet else "transformer_blocks"
    skip = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
    apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn=blocks, **skip))
    return model


@pytest.mark.parametrize(
    ("name", "layout"), [("qwenimage", "gap"), ("unet_sd15", "none")], ids=["qwenimage", "unet"]
)
def test_attention_that_guidance_skips_is_skipped(name: str, layout: Layout) -> None:
    case = BY_NAME[name]
    expected = expect(case, layout, without_attention_in_a_block)
    usual = expect(case, layout)
    assert expected.differs_from(usual)
    model = without_attention_in_a_block(case.build())
    enable_fa3(model, kernel="reference")
    with pytest.warns(FallbackWarning, match="AttentionScoreSkipFunctionMode is active"):
        output = run(case, model, layout)
    assert_within_budget(output, expected.output, expected.exact)
    report = coverage(model)
    assert (report.calls, report.fallbacks) == (usual.calls - 1, 1)


def test_a_pipeline_that_lends_layers_other_processors_gives_the_switched_ones_back() -> None:
    """The pipeline lends one layer a processor for perturbed attention while it denoises."""

    def guided() -> StableDiffusionPAGPipeline:
        names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
        return StableDiffusionPAGPipeline(
            **dict.fromkeys(names),
            vae=vae(),
            unet=BY_NAME["unet_sd15"].build(),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            requires_safety_checker=False,
            pag_applied_layers=["mid"],
        )

    def images(pipe: StableDiffusionPAGPipeline) -> torch.Tensor:
        text = torch.linspace(-1, 1, 12 * 32).view(1, 12, 32)
        return pipe(
            prompt_embeds=text,
            negative_prompt_embeds=-text,
            latents=torch.linspace(-1, 1, 4 * 64).view(1, 4, 8, 8),
            num_inference_steps=2,
            output_type="latent",
        ).images

    pipe = guided()
    enable_fa3(pipe, kernel="reference", fallback="error")
    before = processors(pipe.unet)
    assert torch.equal(images(pipe), images(guided()))
    assert_same_objects(pipe.unet, before)
    counted = {row.name: sum(row.calls.values()) for row in coverage(pipe).rows}
    assert counted.pop("unet.mid_block.attentions.0.transformer_blocks.0.attn1") == 0
    assert set(counted.values()) == {2}


class Silenced(TorchFunctionMode):
    """Makes PyTorch's attention return 0."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 0 * result if func is torch.nn.functional.scaled_dot_product_attention else result


@pytest.mark.parametrize("name", ["flux", "unet_sd15"])
def test_what_takes_the_place_of_torchs_attention_takes_it_in_switched_layers(name: str) -> None:
    case = BY_NAME[name]
    model = case.build()
    usual = run(case, model, "ragged")
    with Silenced():
        expected = run(case, model, "ragged")
        enable_fa3(model, kernel="reference", fallback="silent")
        assert torch.equal(run(case, model, "ragged"), expected)
    assert not torch.allclose(expected, usual)
    assert coverage(model).calls == 0


def test_a_default_device_is_no_reason_to_leave_the_kernel() -> None:
    case = BY_NAME["flux"]
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="error")
    with torch.device("cpu"):
        assert_on_the_kernel(case, model, "ragged", expect(case, "ragged"))
