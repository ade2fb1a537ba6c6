"""Switching affects one model, all of it or nothing, and leaves no trace when it is undone."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention
from tiny import LAYERS, controlled_pipeline, flux, forward, pipeline
from torch import nn
from torch.nn import functional as F

from diffusers_fa3 import (
    FA3AttnProcessor,
    InputError,
    KernelUnavailableError,
    UnsupportedModelError,
    coverage,
    disable_fa3,
    enable_fa3,
    flash_attn_varlen_func,
)


def switched(model: nn.Module) -> list[str]:
    return [name for name, p in model.attn_processors.items() if isinstance(p, FA3AttnProcessor)]


def test_every_layer_of_a_model_is_switched_and_reported() -> None:
    model = flux()
    report = enable_fa3(model, kernel="reference")
    assert [row.name for row in report.rows] == [
        "transformer_blocks.0.attn",
        "transformer_blocks.1.attn",
        "single_transformer_blocks.0.attn",
    ]
    assert report.calls == report.fallbacks == 0
    forward(model)
    assert coverage(model).calls == LAYERS
    assert len(switched(model)) == LAYERS


def test_coverage_is_json_and_a_table() -> None:
    model = flux()
    enable_fa3(model, kernel="reference")
    forward(model)
    report = coverage(model)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.to_dict() == {
        "calls": LAYERS,
        "fallbacks": 0,
        "chosen_default": 0,
        "plans": {"made": 0, "reused": 0},
        "layers": [
            {
                "name": name,
                "processor": "FluxAttnProcessor",
                "kernel": "reference",
                "calls": {"dense": 1},
                "fallbacks": {},
                "choices": {},
                "replaced": False,
                "skipped": 0,
                "unswitchable": "",
            }
            for name in (row.name for row in report.rows)
        ],
    }
    lines = str(report).splitlines()
    assert lines[0].split() == ["layers", "processor", "kernel", "calls"]
    assert lines[1].split() == [
        "transformer_blocks.*.attn", "x2", "FluxAttnProcessor", "reference", "dense", "2",
    ]  # fmt: skip
    assert lines[-1] == ("3 calls on a kernel, 0 on the default attention; 0 plans made, 0 reused")


def test_disabling_gives_back_the_very_objects() -> None:
    model = flux()
    before, default = model.attn_processors, forward(model)
    enable_fa3(model, kernel="reference")
    forward(model)
    disable_fa3(model)
    after = model.attn_processors
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(forward(model), default)
    assert {row.kernel for row in coverage(model).rows} == {"default"}


def test_enabling_twice_takes_the_new_options_and_wraps_once() -> None:
    model = flux()
    before = model.attn_processors
    enable_fa3(model, kernel="reference")
    forward(model)
    enable_fa3(model, kernel="auto")
    report = coverage(model)
    assert report.calls == 0
    assert {row.kernel for row in report.rows} == {"auto"}
    disable_fa3(model)
    assert all(model.attn_processors[name] is before[name] for name in before)


def test_disabling_what_was_never_enabled_changes_nothing() -> None:
    model = flux()
    before = model.attn_processors
    disable_fa3(model)
    assert all(model.attn_processors[name] is before[name] for name in before)


def test_another_model_and_the_process_are_untouched() -> None:
    ours, other = flux(), flux()
    before = (
        F.scaled_dot_product_attention,
        _AttentionBackendRegistry._active_backend,
        dict(_AttentionBackendRegistry._backends),
        {name: id(p) for name, p in other.attn_processors.items()},
    )
    enable_fa3(ours, kernel="reference")
    forward(ours)
    forward(other)
    assert before == (
        F.scaled_dot_product_attention,
        _AttentionBackendRegistry._active_backend,
        dict(_AttentionBackendRegistry._backends),
        {name: id(p) for name, p in other.attn_processors.items()},
    )
    assert {row.kernel for row in coverage(other).rows} == {"default"}


def test_two_models_in_two_threads_do_not_mix() -> None:
    """One model's kernel serves, the other's raises: neither sees the other's settings."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the other model's kernel")

    good, bad = flux(), flux()
    enable_fa3(good, kernel="reference", fallback="error")
    enable_fa3(bad, kernel=refuse)
    expected, failed = forward(good), []

    def run(model: nn.Module) -> None:
        for _ in range(20):
            try:
                if not torch.equal(forward(model), expected):
                    failed.append("another result")
            except RuntimeError as error:
                failed.append(str(error))

    threads = [threading.Thread(target=run, args=(model,)) for model in (good, bad)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == ["the other model's kernel"] * 20


# --- pipelines -----------------------------------------------------------------------------------


def test_of_a_pipeline_the_denoiser_is_switched_and_the_vae_is_not() -> None:
    pipe = pipeline()
    report = enable_fa3(pipe, kernel="reference")
    assert report.rows[0].name == "transformer.transformer_blocks.0.attn"
    assert len(report.rows) == LAYERS
    assert not switched(pipe.vae)
    enable_fa3(pipe.vae, kernel="reference")
    assert switched(pipe.vae)
    disable_fa3(pipe)
    assert not switched(pipe.transformer)


def test_all_denoisers_of_a_pipeline_are_switched() -> None:
    pipe = controlled_pipeline()
    report = enable_fa3(pipe, kernel="reference")
    models = {row.name.split(".")[0] for row in report.rows}
    assert models == {"transformer", "controlnet"}


# --- a part of the layers ------------------------------------------------------------------------


def test_a_function_as_kernel_has_its_name_in_coverage_before_the_first_call() -> None:
    model = flux()
    enable_fa3(model, kernel=flash_attn_varlen_func)
    assert {row.kernel for row in coverage(model).rows} == {"flash_attn_varlen_func"}


@pytest.mark.parametrize(
    "layers",
    [r"^transformer_blocks", lambda name, module: name.startswith("transformer_blocks")],
    ids=["regex", "predicate"],
)
def test_layers_selects(layers: object) -> None:
    model = flux()
    default = forward(model)
    report = enable_fa3(model, kernel="reference", layers=layers)
    assert [row.kernel for row in report.rows] == ["reference", "reference", "default"]
    torch.testing.assert_close(forward(model), default)
    assert coverage(model).calls == 2


def test_layers_that_selects_nothing_is_an_error() -> None:
    model = flux()
    with pytest.raises(UnsupportedModelError, match="selects none of the 3 attention layers"):
        enable_fa3(model, layers="no such layer")
    assert not switched(model)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [enable_fa3, disable_fa3, coverage])
@pytest.mark.parametrize("thing", [nn.Linear(2, 2), object(), None, "flux"])
def test_what_has_no_attention_layer_is_refused(function, thing: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no attention layer|take a torch.nn.Module"):
        function(thing)


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    pipe = FluxPipeline(*[None] * 7)
    with pytest.raises(UnsupportedModelError, match="FluxPipeline has no attention layer"):
        enable_fa3(pipe)


def test_an_unknown_kernel_leaves_the_model_as_it_was() -> None:
    model = flux()
    with pytest.raises(KernelUnavailableError, match='no kernel is called "fa33"'):
        enable_fa3(model, kernel="fa33")
    assert not switched(model)


def test_an_unknown_fallback_leaves_the_model_as_it_was() -> None:
    model = flux()
    with pytest.raises(InputError, match="fallback is one of"):
        enable_fa3(model, fallback="quietly")
    assert not switched(model)


def test_every_member_of_a_component_that_is_a_list_is_switched() -> None:
    nets = [nn.ModuleDict({"attn": Attention(query_dim=8)}) for _ in range(3)]
    report = enable_fa3(SimpleNamespace(components={"controlnet": nets, "vae": nets[0]}))
    assert [row.name for row in report.rows] == [f"controlnet.{i}.attn" for i in range(3)]
    assert all(row.kernel == "auto" for row in report.rows)
