"""LoRA and IP-Adapters, loaded and set by diffusers' own methods, take effect under the kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from switching import (
    BY_NAME,
    Treatment,
    assert_on_the_kernel,
    assert_same_objects,
    expect,
    processors,
    run,
)
from torch import nn
from zoo import Case

from diffusers_fa3 import coverage, disable_fa3, enable_fa3

Act = Callable[[DiffusionPipeline], None]


def flux_pipeline(model: nn.Module) -> DiffusionPipeline:
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(scheduler, **dict.fromkeys(names), transformer=model)


def sd3_pipeline(model: nn.Module) -> DiffusionPipeline:
    encoders = [f"{part}{n}" for n in ("", "_2", "_3") for part in ("text_encoder", "tokenizer")]
    scheduler = FlowMatchEulerDiscreteScheduler()
    return StableDiffusion3Pipeline(
        model, scheduler, vae=None, **dict.fromkeys(encoders), image_encoder=None
    )


def unet_pipeline(model: nn.Module) -> DiffusionPipeline:
    names = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(
        **dict.fromkeys(names), unet=model, scheduler=scheduler, requires_safety_checker=False
    )


PIPELINES = {"flux": flux_pipeline, "sd3": sd3_pipeline, "unet_sd15": unet_pipeline}
NAMES = {
    FluxPipeline: "flux",
    StableDiffusion3Pipeline: "sd3",
    StableDiffusionPipeline: "unet_sd15",
}

every_pipeline = pytest.mark.parametrize("name", PIPELINES)


def treated(name: str, *acts: Act) -> Treatment:
    """The treatment of a model by these acts on its pipeline."""

    def treat(model: nn.Module) -> nn.Module:
        pipe = PIPELINES[name](model)
        for act in acts:
            act(pipe)
        return model

    return treat


# --- LoRA ----------------------------------------------------------------------------------------


def load_lora(pipe: DiffusionPipeline) -> None:
    """Load a LoRA of the attention's projections, with weights as in a file."""
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    model = getattr(pipe, component)
    donor = type(model)(**model.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        targets = ["to_q", "to_k", "to_v"]
        donor.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    weights = get_peft_model_state_dict(donor)
    pipe.load_lora_weights(
        {f"{component}.{key}": weight for key, weight in weights.items()}, adapter_name="lora"
    )


def half_lora(pipe: DiffusionPipeline) -> None:
    pipe.set_adapters("lora", 0.5)


def fuse_lora(pipe: DiffusionPipeline) -> None:
    pipe.fuse_lora()


def unfuse_lora(pipe: DiffusionPipeline) -> None:
    pipe.unfuse_lora()


def unload_lora(pipe: DiffusionPipeline) -> None:
    pipe.unload_lora_weights()


LORA: tuple[Act, ...] = (load_lora, half_lora, fuse_lora, unfuse_lora, unload_lora)


@every_pipeline
def test_a_lora_takes_effect_in_each_of_its_states(name: str) -> None:
    case, layout = BY_NAME[name], "ragged"
    without = expect(case, layout)
    model = case.build()
    before, pipe = processors(model), PIPELINES[name](model)
    enable_fa3(pipe, kernel="reference", fallback="error")
    for done, act in enumerate(LORA, start=1):
        act(pipe)
        expected = expect(case, layout, treated(name, *LORA[:done]))
        assert expected.differs_from(without) == (act is not unload_lora)
        assert_on_the_kernel(case, model, layout, expected)
    assert coverage(pipe).calls == len(LORA) * without.calls
    disable_fa3(pipe)
    assert_same_objects(model, before)


@every_pipeline
def test_a_model_with_a_lora_is_switched_as_any_other(name: str) -> None:
    case, layout = BY_NAME[name], "ragged"
    expected = expect(case, layout, treated(name, load_lora))
    model = treated(name, load_lora)(case.build())
    weights = {key: weight.clone() for key, weight in model.state_dict().items()}
    enable_fa3(model, kernel="reference", fallback="error")
    assert_on_the_kernel(case, model, layout, expected)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())


# --- IP-Adapters ---------------------------------------------------------------------------------


def ip_adapter_weights(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Weights as in an IP-Adapter's file, taken from a model of the zoo that has an adapter."""
    donor = with_adapter(name).build()
    if name == "sd3":
        projection = donor.image_proj.state_dict()
    else:
        projection = donor.encoder_hid_proj.image_projection_layers[0].state_dict()
    adapters = [p for p in donor.attn_processors.values() if hasattr(p, "to_k_ip")]
    unet = name.startswith("unet")
    numbers = range(1, 2 * len(adapters), 2) if unet else range(len(adapters))
    return {
        "image_proj": {
            key.replace("image_embeds", "proj"): weight for key, weight in projection.items()
        },
        "ip_adapter": {
            f"{number}.{key.replace('_ip.0', '_ip')}": weight
            for number, adapter in zip(numbers, adapters)
            for key, weight in adapter.state_dict().items()
        },
    }


def load_ip_adapter(pipe: DiffusionPipeline) -> None:
    name = NAMES[type(pipe)]
    encoder = "pretrained_model_name_or_path" if name == "flux" else "folder"
    weights = ip_adapter_weights(name)
    pipe.load_ip_adapter(
        weights, subfolder="", weight_name="", **{f"image_encoder_{encoder}": None}
    )


def weak_ip_adapter(pipe: DiffusionPipeline) -> None:
    pipe.set_ip_adapter_scale(0.3)


def no_ip_adapter(pipe: DiffusionPipeline) -> None:
    pipe.set_ip_adapter_scale(0.0)


def with_adapter(name: str) -> Case:
    """The case of the same model with an IP-Adapter."""
    return BY_NAME[f"{name.removesuffix('_sd15')}_ip_adapter"]


def with_image(name: str) -> Case:
    """The same case with an image among its inputs, but without the adapter."""
    return replace(with_adapter(name), prepare=None)


def unload_ip_adapter(pipe: DiffusionPipeline) -> None:
    pipe.unload_ip_adapter()


@every_pipeline
def test_an_ip_adapter_takes_effect_once_the_model_is_switched_again(name: str) -> None:
    plain, layout = BY_NAME[name], "ragged"
    case = with_image(name)
    model = plain.build()
    pipe = PIPELINES[name](model)
    enable_fa3(pipe, kernel="reference", fallback="error")
    run(plain, model, layout)

    load_ip_adapter(pipe)
    own = processors(model)
    expected = expect(case, layout, treated(name, load_ip_adapter))
    assert torch.equal(run(case, model, layout), expected.output)  # on the default attention
    # SD3's adapter comes with a resampler, whose layers are new.
    assert all(row.replaced != ("image_proj" in row.name) for row in coverage(pipe).rows)
    assert coverage(pipe).calls == 0
    enable_fa3(pipe, kernel="reference", fallback="error")
    assert_on_the_kernel(case, model, layout, expected)

    for act in (weak_ip_adapter, no_ip_adapter):
        act(pipe)
        changed = expect(case, layout, treated(name, load_ip_adapter, act))
        assert changed.differs_from(expected)
        assert_on_the_kernel(case, model, layout, changed)
    disable_fa3(pipe)
    assert_same_objects(model, own)

    enable_fa3(pipe, kernel="reference", fallback="error")
    unload_ip_adapter(pipe)
    assert all(row.replaced for row in coverage(pipe).rows)
    enable_fa3(pipe, kernel="reference", fallback="error")
    assert_on_the_kernel(plain, model, layout, expect(plain, layout))
