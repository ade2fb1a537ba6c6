"""What public reports told of, put on a switched model: each is right, and stays right."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES

from diffusers_fa3 import (
    FA3AttnProcessor,
    FallbackWarning,
    UnsupportedModelError,
    coverage,
    disable_fa3,
    enable_fa3,
    register,
    unregister,
)
from diffusers_fa3.layers.processor import record_of

UNET = next(case for case in CASES if case.name == "unet_sd15")


# --- google/prompt-to-prompt#37 with diffusers#5270: classes made in a function, memory -----------


def control(model: UNet2DConditionModel, controller: object) -> None:
    """Processors that close over the model, as prompt-to-prompt registers them."""

    class Controlled(AttnProcessor2_0):
        def __call__(
            self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            assert controller is not None
            return super().__call__(attn, hidden_states, *args, **kwargs)

    class Own:
        def __call__(
            self,
            attn: Attention,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            *_: Any,
            **__: Any,
        ) -> Tensor:
            assert model is not None
            text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = (
                x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
            )
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return attn.to_out[0](out)

    made = (Controlled, Own)
    model.set_attn_processor({name: made[i % 2]() for i, name in enumerate(model.attn_processors)})


@pytest.mark.parametrize("disabled", [False, True])
def test_a_model_that_its_processors_close_over_is_freed(disabled: bool) -> None:
    def run() -> list[weakref.ref[Any]]:
        model, controller = UNET.build(), torch.zeros(1)
        control(model, controller)
        enable_fa3(model, kernel="reference", fallback="error")
        UNET.run(model, "none")
        assert coverage(model).calls == len(model.attn_processors)
        if disabled:
            disable_fa3(model)
        return [weakref.ref(model), weakref.ref(controller)]

    watched = run()
    gc.collect()
    assert [reference() for reference in watched] == [None, None]


def test_a_class_made_of_another_ones_attributes_is_wrapped_for_itself() -> None:
    """As dataclasses with slots are: everything that lies on the first is on the second."""
    first = FA3AttnProcessor(AttnProcessor2_0(), kernel="reference")
    attributes = {
        n: x for n, x in vars(AttnProcessor2_0).items() if n not in ("__dict__", "__weakref__")
    }
    other = type("Other", (), attributes)
    wrapped = FA3AttnProcessor(other(), kernel="reference")
    assert isinstance(wrapped, other)
    assert not isinstance(wrapped, AttnProcessor2_0)
    layers = [Attention(query_dim=8, heads=2, dim_head=4, processor=p) for p in (first, wrapped)]
    for layer in layers:
        layer(torch.randn(1, 3, 8))
        assert coverage(layer).calls == 1


# --- diffusers#11903: processors that a model keeps for unfusing ---------------------------------


def test_disabling_reaches_the_processors_that_unfusing_gives_back() -> None:
    model = UNET.build()
    enable_fa3(model, kernel="reference")
    model.fuse_qkv_projections()
    disable_fa3(model)
    model.unfuse_qkv_projections()
    assert [p for p in model.attn_processors.values() if record_of(p)] == []
    default = UNET.run(UNET.build(), "none")
    torch.testing.assert_close(UNET.run(model, "none"), default)


# --- diffusers#7639: a processor that returns what it computed in an earlier step -----------------


class Gate(AttnProcessor2_0):
    """T-GATE's idea: from the third run on, the attention of the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.runs += 1
        if self.runs <= 2:
            self.kept = super().__call__(*args, **kwargs)
        return self.kept


def test_a_processor_that_reuses_its_output_is_no_fallback_and_is_told() -> None:
    layer = Attention(query_dim=8, heads=2, dim_head=4, processor=Gate())
    enable_fa3(layer, kernel="reference", fallback="error")
    outputs = [layer(torch.randn(1, 3, 8)) for _ in range(5)]
    assert torch.equal(outputs[4], outputs[1])
    report = coverage(layer)
    assert (report.calls, report.fallbacks, report.rows[0].skipped) == (2, 0, 3)
    assert "3 runs of a processor made no attention call" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["skipped"] == 3


def test_a_processor_that_never_reaches_attention_goes_on_being_counted() -> None:
    class Never(AttnProcessor2_0):
        def __call__(self, attn: Attention, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden_states

    layer = Attention(query_dim=8, heads=2, dim_head=4, processor=Never())
    enable_fa3(layer, kernel="reference", fallback="silent")
    for _ in range(3):
        layer(torch.randn(1, 3, 8))
    row = coverage(layer).rows[0]
    assert (sum(row.fallbacks.values()), row.skipped) == (3, 0)


# --- a function among the processors, and a request for all of them -------------------------------


def function(attn: Attention, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return AttnProcessor2_0()(attn, hidden_states)


def test_a_request_leaves_a_function_and_switches_the_rest() -> None:
    model = UNET.build()
    names = list(model.attn_processors)
    model.set_attn_processor(
        {name: function if name == names[0] else AttnProcessor2_0() for name in names}
    )
    register()
    try:
        with pytest.warns(FallbackWarning, match="not counted"):
            model.set_attn_processor(FA3AttnProcessor(kernel="reference"))
        switched = [record_of(p) is not None for p in model.attn_processors.values()]
        assert switched == [False] + [True] * (len(names) - 1)
        layer = nn.ModuleList([Attention(query_dim=8, processor=function)])[0]
        with pytest.raises(UnsupportedModelError, match="cannot be switched"):
            layer.set_processor(FA3AttnProcessor(fallback="error"))
        assert layer.processor is function
    finally:
        unregister()
