"""A switched model that is moved, copied, saved or trained stays right, switched and counted."""

from __future__ import annotations

import copy
import filecmp
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline
from gradients import gradients
from switching import (
    BY_NAME,
    Treatment,
    assert_on_the_kernel,
    assert_same_objects,
    expect,
    processors,
    run,
    switched,
)
from tiny import LAYERS, flux, forward, pipeline
from torch import nn
from torch.nn import functional as F
from zoo import Layout
from zoo.budget import assert_within_budget
from zoo.watch import watched

from diffusers_fa3 import coverage, disable_fa3, enable_fa3

CPU = torch.device("cpu")

every_model = pytest.mark.parametrize(
    ("name", "layout"), [("flux", "ragged"), ("unet_sd15", "gap")], ids=["flux", "unet"]
)
"""One model's processors call diffusers' dispatcher, the other's call PyTorch's attention."""


# --- what may be done to a model -----------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear layer that stores 8-bit weights and dequantises them in each forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


def with_int8_linears(model: nn.Module) -> nn.Module:
    for layer in list(model.modules()):
        for name, child in list(layer.named_children()):
            if name in ("to_q", "to_k", "to_v"):
                setattr(layer, name, Int8Linear(child))
    return model


def reloaded_from_meta(model: nn.Module) -> nn.Module:
    weights = model.state_dict()
    model.to("meta")
    model.load_state_dict(weights, assign=True)
    return model


def dispatched(model: nn.Module) -> nn.Module:
    return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def offloaded_in_sequence(model: nn.Module) -> nn.Module:
    return cpu_offload(model, execution_device=CPU)


def offloaded_as_a_whole(model: nn.Module) -> nn.Module:
    return cpu_offload_with_hook(model, execution_device=CPU)[0]


def offloaded_by_leaf(model: nn.Module) -> nn.Module:
    model.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    return model


def offloaded_by_block(model: nn.Module) -> nn.Module:
    model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)
    return model


def cast_by_layer(model: nn.Module) -> nn.Module:
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=model.dtype)
    return model


@every_model
@pytest.mark.parametrize(
    "treat",
    [
        with_int8_linears,
        reloaded_from_meta,
        dispatched,
        offloaded_in_sequence,
        offloaded_as_a_whole,
        offloaded_by_leaf,
        offloaded_by_block,
        cast_by_layer,
    ],
    ids=lambda treat: treat.__name__,
)
def test_what_is_done_to_a_model_is_done_to_a_switched_one(
    name: str, layout: Layout, treat: Treatment
) -> None:
    case = BY_NAME[name]
    expected = expect(case, layout, treat)

    model = case.build()
    before = processors(model)
    enable_fa3(model, kernel="reference", fallback="error")
    run(case, model, layout)
    model = treat(model)
    assert_on_the_kernel(case, model, layout, expected)
    assert coverage(model).calls == 2 * expected.calls

    plain = treat(case.build())
    weights = plain.state_dict()
    assert list(model.state_dict()) == list(weights)
    for key, weight in model.state_dict().items():
        assert weight.device == weights[key].device
        assert weight.is_meta or torch.equal(weight, weights[key])
    disable_fa3(model)
    assert_same_objects(model, before)
    assert torch.equal(run(case, model, layout), expected.output)

    enable_fa3(plain, kernel="reference", fallback="error")
    assert_on_the_kernel(case, plain, layout, expected)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_a_switched_model_takes_another_dtype(
    name: str, layout: Layout, dtype: torch.dtype
) -> None:
    case = BY_NAME[name]
    expected = expect(case, layout, lambda model: model.to(dtype))
    exact = run(case, case.build(torch.float64), layout)
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="error")
    model.to(dtype)
    assert_within_budget(run(case, model, layout), expected.output, exact)
    assert coverage(model).calls == expected.calls


@every_model
def test_shapes_are_found_on_the_meta_device(name: str, layout: Layout) -> None:
    """A mask on the meta device has no content to read, so PyTorch's attention serves."""
    case = BY_NAME[name]
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="silent")
    shape = run(case, model, layout).shape
    served = coverage(model)
    model.to("meta")
    assert case.run(model, layout).shape == shape
    report = coverage(model)
    masked = sum(served.rows[i].calls.get("dense", 0) == 0 for i in range(len(served.rows)))
    assert report.fallbacks == masked > 0
    assert report.calls == 2 * served.calls - masked


# --- copies --------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    ("name", "layout"),
    [("flux", "ragged"), ("unet_sd15", "gap"), ("unet_ip_adapter", "ragged"), ("chroma", "left")],
    ids=["flux", "unet", "weights-in-processors", "hooks-on-blocks"],
)
def test_a_copy_of_a_model_is_switched_and_counts_for_itself(
    name: str, layout: Layout, how: str
) -> None:
    case = BY_NAME[name]
    expected = expect(case, layout)
    model = case.build()
    own = processors(model)
    enable_fa3(model, kernel="reference", fallback="error")
    run(case, model, layout)

    other = COPIES[how](model)
    assert coverage(other).calls == 0
    assert switched(other) == switched(model) != set()
    assert_on_the_kernel(case, other, layout, expected)
    assert coverage(model).calls == expected.calls

    weights = model.state_dict()
    assert list(other.state_dict()) == list(weights)
    assert all(torch.equal(weight, weights[key]) for key, weight in other.state_dict().items())

    disable_fa3(other)
    assert switched(other) == set()
    assert [type(p) for p in processors(other).values()] == [type(p) for p in own.values()]
    assert_on_the_kernel(case, model, layout, expected)


# --- files ---------------------------------------------------------------------------------------


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(
        str(path.relative_to(other)) for path in other.rglob("*") if path.is_file()
    )
    same, different, unreadable = filecmp.cmpfiles(one, other, names, shallow=False)
    assert (different, unreadable) == ([], [])
    assert same


@pytest.mark.parametrize("options", [{}, {"device_map": {"": "cpu"}}], ids=["plain", "device_map"])
@pytest.mark.parametrize("name", ["flux", "unet_sd15", "unet_ip_adapter"])
def test_a_switched_model_is_saved_as_any_other(
    name: str, options: dict[str, object], tmp_path: Path
) -> None:
    case, layout = BY_NAME[name], "ragged"
    expected = expect(case, layout)
    model = case.build()
    model.save_pretrained(tmp_path / "plain")
    enable_fa3(model, kernel="reference", fallback="error")
    run(case, model, layout)
    model.save_pretrained(tmp_path / "switched")
    assert_same_files(tmp_path / "plain", tmp_path / "switched")
    if name == "unet_ip_adapter":
        return  # diffusers itself cannot load this model from its files

    loaded = case.model.from_pretrained(tmp_path / "switched", **options).eval()
    assert switched(loaded) == set()
    assert torch.equal(run(case, loaded, layout), expected.output)
    enable_fa3(loaded, kernel="reference", fallback="error")
    assert_on_the_kernel(case, loaded, layout, expected)


def test_a_switched_pipeline_is_saved_as_any_other(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "plain")
    enable_fa3(pipe, kernel="reference", fallback="error")
    pipe.save_pretrained(tmp_path / "switched")
    assert_same_files(tmp_path / "plain", tmp_path / "switched")

    none = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "switched", **none)
    assert switched(loaded.transformer) == set()
    enable_fa3(loaded, kernel="reference", fallback="error")
    assert torch.equal(forward(loaded.transformer), forward(pipe.transformer))
    assert coverage(loaded).calls == coverage(pipe).calls == LAYERS


def test_a_pipeline_made_from_a_switched_one_shares_its_models_and_their_switch() -> None:
    pipe = pipeline()
    enable_fa3(pipe, kernel="reference", fallback="error")
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    forward(other.transformer)
    assert coverage(other).calls == coverage(pipe).calls == LAYERS
    disable_fa3(other)
    assert switched(pipe.transformer) == set()


def test_a_pipeline_that_is_offloaded_stays_switched() -> None:
    default = forward(flux())
    pipe = pipeline()
    enable_fa3(pipe, kernel="reference", fallback="error")
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(forward(pipe.transformer), default)
    pipe.remove_all_hooks()
    pipe.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    assert torch.equal(forward(pipe.transformer), default)
    assert coverage(pipe).calls == 2 * LAYERS


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [("flux", "none"), ("qwenimage", "gap"), ("unet_sd15", "ragged"), ("chroma", "left")],
    ids=["flux", "qwenimage", "unet", "chroma"],
)
def test_gradients_are_those_of_the_default(name: str, layout: Layout, checkpointing: bool) -> None:
    def trained(dtype: torch.dtype = torch.float32) -> nn.Module:
        model = BY_NAME[name].build(dtype).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        return model

    model = trained()
    enable_fa3(model, kernel="reference", fallback="error")
    with watched() as log:
        default = gradients(BY_NAME[name], layout, trained())
    exact = gradients(BY_NAME[name], layout, trained(torch.float64))
    assert_within_budget(gradients(BY_NAME[name], layout, model), default, exact)
    assert coverage(model).calls == len(log.calls)  # with the second forward of checkpointing
