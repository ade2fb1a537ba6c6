"""A diffusers backend is set, for a model, a layer or the process, before or after a switch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from switching import (
    BY_NAME,
    assert_on_the_kernel,
    assert_same_objects,
    expect,
    processors,
    run,
    switched,
)
from torch import nn
from zoo import Case, Layout
from zoo.budget import assert_within_budget

from diffusers_fa3 import FallbackWarning, coverage, enable_fa3, register, unregister

LAYOUT: Layout = "ragged"
BACKENDS = ("native", "_native_math")


@pytest.fixture
def process_backend() -> Iterator[None]:
    """Restore the backend of the process, which diffusers' methods for one model set too."""
    active = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = active


@pytest.fixture
def registered(process_backend: None) -> Iterator[None]:
    register()
    yield
    unregister()


def assert_served_by_the_backend(case: Case, model: nn.Module, backend: str) -> None:
    """The backend serves all calls of one forward, and each is counted as a fallback."""
    before = coverage(model)
    expected = expect(case, LAYOUT)
    assert_within_budget(run(case, model, LAYOUT), expected.output, expected.exact)
    report = coverage(model)
    assert report.calls == before.calls
    assert report.fallbacks - before.fallbacks == expected.calls
    for row in report.rows:
        (reason,) = row.fallbacks
        assert reason.startswith(f"the layer is set to backend {backend}")


@pytest.mark.usefixtures("process_backend")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_set_after_the_switch_is_used_until_it_is_reset(backend: str) -> None:
    case = BY_NAME["flux"]
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="silent")
    model.set_attention_backend(backend)
    assert len(switched(model)) == 2
    assert_served_by_the_backend(case, model, backend)
    model.reset_attention_backend()
    assert_on_the_kernel(case, model, LAYOUT, expect(case, LAYOUT))


@pytest.mark.usefixtures("process_backend")
def test_a_backend_set_before_the_switch_is_kept_and_told() -> None:
    case = BY_NAME["flux"]
    model = case.build()
    model.set_attention_backend("native")
    enable_fa3(model, kernel="reference")
    with pytest.warns(FallbackWarning, match="the layer is set to backend native"):
        run(case, model, LAYOUT)
    model.reset_attention_backend()
    assert_on_the_kernel(case, model, LAYOUT, expect(case, LAYOUT))


@pytest.mark.usefixtures("process_backend")
def test_a_backend_set_for_one_layer_is_used_in_that_layer() -> None:
    case = BY_NAME["flux"]
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="silent")
    model.transformer_blocks[0].attn.set_attention_backend("native")
    run(case, model, LAYOUT)
    first, second = coverage(model).rows
    assert first.fallbacks == {
        "the layer is set to backend native, until reset_attention_backend": 1
    }
    assert second.calls == {"packed": 1}


@pytest.mark.usefixtures("process_backend")
def test_layers_that_take_no_backend_stay_on_the_kernel() -> None:
    """`set_attention_backend` does nothing to such layers, switched or not."""
    case = BY_NAME["unet_sd15"]
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="error")
    model.set_attention_backend("native")
    assert_on_the_kernel(case, model, LAYOUT, expect(case, LAYOUT))
    model.reset_attention_backend()
    assert_on_the_kernel(case, model, LAYOUT, expect(case, LAYOUT))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["flux", "unet_sd15"])
def test_once_registered_another_backend_switches_off_layers_of_both_kinds(name: str) -> None:
    case = BY_NAME[name]
    model = case.build()
    before = processors(model)
    enable_fa3(model, kernel="reference", fallback="error")
    model.set_attention_backend("native")
    assert_same_objects(model, before)
    assert torch.equal(run(case, model, LAYOUT), run(case, case.build(), LAYOUT))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["flux", "unet_sd15"])
def test_once_registered_fa3_takes_the_place_of_another_backend(name: str) -> None:
    case = BY_NAME[name]
    expected = expect(case, LAYOUT)
    model = case.build()
    for _ in range(2):
        model.set_attention_backend("native")
        model.set_attention_backend("fa3")
        assert_on_the_kernel(case, model, LAYOUT, expected)


@pytest.mark.parametrize("name", ["flux", "unet_sd15"])
def test_the_backend_of_the_process_is_not_that_of_switched_layers(name: str) -> None:
    """A switched layer acts as if it had a backend of its own, which diffusers prefers."""
    case = BY_NAME[name]
    expected = expect(case, LAYOUT)
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="error")
    active = _AttentionBackendRegistry.get_active_backend()
    for backend in BACKENDS:
        with attention_backend(backend):
            assert_on_the_kernel(case, model, LAYOUT, expected)
    assert _AttentionBackendRegistry.get_active_backend() == active


def test_what_no_kernel_takes_goes_to_the_backend_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backend of the process is the default attention of layers that call the dispatcher."""
    case = BY_NAME["flux"]
    model = case.build()
    inputs = case.inputs("none", 0.0)
    tokens = inputs["hidden_states"].shape[1] + inputs["encoder_hidden_states"].shape[1]
    inputs["joint_attention_kwargs"] = {"attention_mask": torch.rand(1, 1, tokens, tokens)}
    enable_fa3(model, kernel="reference", fallback="silent")
    served = []

    def serve(query: torch.Tensor, **_: object) -> torch.Tensor:
        served.append(query)
        return query

    backends = _AttentionBackendRegistry._backends
    monkeypatch.setitem(backends, AttentionBackendName._NATIVE_FLASH, serve)
    with attention_backend("_native_flash"):
        model(**inputs)
    assert (coverage(model).calls, coverage(model).fallbacks) == (0, len(served)) != (0, 0)
