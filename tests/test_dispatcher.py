"""register() makes diffusers' own switches know "fa3"; unregister() leaves no trace of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from releases import needs
from tiny import LAYERS, flux, forward, pipeline

from diffusers_fa3 import (
    FA3AttnProcessor,
    FallbackWarning,
    UnsupportedModelError,
    coverage,
    enable_fa3,
    register,
    unregister,
)

CLASSES = (Attention, AttentionModuleMixin, DiffusionPipeline, ModelMixin)


def state_of_diffusers() -> list[object]:
    registry = _AttentionBackendRegistry
    return [
        *(dict(vars(cls)) for cls in CLASSES),
        dict(vars(AttentionBackendName)),
        dict(registry._backends),
        dict(registry._constraints),
        dict(registry._supported_arg_names),
        set(registry._supports_context_parallel),
        registry._active_backend,
    ]


@pytest.fixture
def registered() -> Iterator[None]:
    active = _AttentionBackendRegistry._active_backend
    register()
    yield
    unregister()
    _AttentionBackendRegistry._active_backend = active


def test_there_and_back_leaves_no_trace() -> None:
    before = state_of_diffusers()
    register()
    assert state_of_diffusers() != before
    register()
    unregister()
    assert state_of_diffusers() == before
    unregister()
    assert state_of_diffusers() == before


@pytest.mark.usefixtures("registered")
def test_a_request_on_a_pipeline_switches_its_denoisers() -> None:
    pipe = pipeline()
    before = pipe.transformer.attn_processors
    default = forward(pipe.transformer)
    pipe.set_attn_processor(FA3AttnProcessor(kernel="reference"))
    torch.testing.assert_close(forward(pipe.transformer), default)
    assert coverage(pipe).calls == LAYERS
    # any other processor goes to the models
    pipe.set_attn_processor({f"{name}": p for name, p in before.items()})
    assert all(pipe.transformer.attn_processors[name] is before[name] for name in before)


@pytest.mark.usefixtures("registered")
def test_a_request_on_a_model_keeps_each_layers_own_processor() -> None:
    model = flux()
    before = model.attn_processors
    model.set_attn_processor(FA3AttnProcessor(kernel="reference"))
    forward(model)
    assert coverage(model).calls == LAYERS
    assert all(
        type(p).__mro__.index(FA3AttnProcessor) and p.__class__ is type(before[name])
        for name, p in model.attn_processors.items()
    )


@pytest.mark.usefixtures("registered")
def test_a_backend_name_on_a_model_switches_it_and_no_other() -> None:
    model, other = flux(), flux()
    active = _AttentionBackendRegistry._active_backend
    model.set_attention_backend("fa3")
    forward(model)
    assert coverage(model).calls == LAYERS or coverage(model).fallbacks == LAYERS
    assert {row.kernel for row in coverage(other).rows} == {"default"}
    assert _AttentionBackendRegistry._active_backend is active


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "back", [lambda m: m.set_attention_backend("native"), lambda m: m.reset_attention_backend()]
)
def test_another_backend_or_a_reset_switches_it_off(back) -> None:
    model = flux()
    before = model.attn_processors
    model.set_attention_backend("fa3")
    back(model)
    assert all(model.attn_processors[name] is before[name] for name in before)


@pytest.mark.usefixtures("registered")
def test_an_unknown_backend_is_refused_as_before_and_switches_nothing_off() -> None:
    model = flux()
    enable_fa3(model, kernel="reference")
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend("fa33")
    assert {row.kernel for row in coverage(model).rows} == {"reference"}


def attend(mask: torch.Tensor | None = None) -> torch.Tensor:
    q, k, v = torch.randn(3, 2, 6, 4, 8, generator=torch.Generator().manual_seed(0))
    return dispatch_attention_fn(q, k, v, attn_mask=mask)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "mask",
    [
        None,
        torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1]], dtype=torch.bool),
    ],
    ids=["none", "gap"],
)
def test_the_process_wide_switch_serves_layers_that_were_not_switched(
    mask: torch.Tensor | None,
) -> None:
    if mask is not None:
        needs("0.37", "hands (B, Sk) masks to PyTorch as they are, which raises")
    default = attend(mask)
    with attention_backend("fa3"):
        assert _AttentionBackendRegistry.get_active_backend()[0] == "fa3"
        torch.testing.assert_close(attend(mask), default)
    assert _AttentionBackendRegistry._active_backend is not None
    assert _AttentionBackendRegistry._active_backend != "fa3"


def test_the_process_wide_switch_warns_of_what_no_kernel_takes(registered: None) -> None:
    bias = torch.rand(2, 1, 6, 6)
    default = attend(bias)
    with attention_backend("fa3"), pytest.warns(FallbackWarning, match='"fa3".*a bias'):
        assert torch.equal(attend(bias), default)


def test_unregistering_while_it_is_the_active_backend_leaves_the_native_one() -> None:
    active = _AttentionBackendRegistry._active_backend
    register()
    try:
        _AttentionBackendRegistry._active_backend = AttentionBackendName("fa3")
        unregister()
        assert _AttentionBackendRegistry._active_backend is AttentionBackendName.NATIVE
        attend()
    finally:
        unregister()
        _AttentionBackendRegistry._active_backend = active


def test_layers_switched_meanwhile_stay_switched() -> None:
    model = flux()
    register()
    model.set_attn_processor(FA3AttnProcessor(kernel="reference"))
    unregister()
    forward(model)
    assert coverage(model).calls == LAYERS


def test_without_register_a_request_is_refused_by_the_layer_that_calls_it() -> None:
    model = flux()
    model.set_attn_processor(FA3AttnProcessor())
    with pytest.raises(UnsupportedModelError, match=r"after diffusers_fa3.register\(\)"):
        forward(model)


def test_without_register_the_name_is_unknown() -> None:
    with pytest.raises(ValueError, match="fa3"):
        AttentionBackendName("fa3")


@pytest.mark.usefixtures("registered")
def test_methods_keep_their_signatures_for_those_who_read_them() -> None:
    layer = Attention(8, heads=2, dim_head=4, processor=AttnProcessor2_0())
    assert list(inspect.signature(layer.set_processor).parameters) == ["processor"]
    assert layer.set_processor.__doc__
