"""Real diffusers models on the reference kernel give what they give on their own processors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from zoo import CASES, RUN_IDS, RUNS, Case, Layout
from zoo.budget import assert_within_budget
from zoo.case import BATCH, cast
from zoo.watch import watched

from diffusers_fa3 import FA3AttnProcessor, FA3Error, coverage, disable_fa3, enable_fa3
from diffusers_fa3.layers.frame import running

NO_CALL = "makes no attention call that could be switched"
VARLEN = ("packed", "seqused", "band")
EQUAL_MASKS = ("longcat_audio_dit",)
"""Models that are given two masks of the same content, which get a plan each."""
BY_NAME = {case.name: case for case in CASES}

every_run = pytest.mark.parametrize(("case", "layout"), RUNS, ids=RUN_IDS)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def every_reused_plan_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.plans, "verify", True)


def enable(model: nn.Module, case: Case) -> None:
    """Switch to the reference kernel; only a case that says so may leave calls to the default."""
    left = case.refusal or case.unreached
    enable_fa3(model, kernel="reference", fallback="silent" if left else "error")


def processors(model: nn.Module) -> dict[str, object]:
    """Return the processor of every attention layer."""
    modules = model.named_modules()
    return {name: layer.processor for name, layer in modules if hasattr(layer, "processor")}


def total(report: Mapping[str, Any], column: str) -> Counter[str]:
    """Return the sum of a column ("calls" or "fallbacks") over all layers of a report."""
    return sum((Counter(layer[column]) for layer in report["layers"]), Counter())


def assert_on_the_kernel(model: nn.Module, case: Case) -> None:
    """Assert that every layer was switched, and that its calls ran on the kernel or are refused."""
    report = coverage(model).to_dict()
    assert all(layer["kernel"] == "reference" for layer in report["layers"])
    assert total(report, "calls").keys() <= {"dense", *VARLEN}
    refused = [layer for layer in report["layers"] if layer["fallbacks"]]
    assert report["calls"] > 0 or len(refused) == len(report["layers"]) or case.unreached
    for layer in refused:
        for reason in layer["fallbacks"]:
            if case.refusal is None:
                assert case.unreached
                assert reason == NO_CALL or reason.startswith("the layer is set to backend")
            else:
                assert re.search(case.refusal.layer, layer["name"])
                assert re.search(case.refusal.reason, reason)


@every_run
def test_output_is_that_of_the_default_and_every_call_is_accounted_for(
    case: Case, layout: Layout
) -> None:
    model = case.build()
    with watched() as log:
        default = case.run(model, layout)

    enable(model, case)
    output = case.run(model, layout)
    assert_within_budget(output, default, case.exact(layout))

    assert_on_the_kernel(model, case)
    report = coverage(model).to_dict()
    routes, reasons = total(report, "calls"), total(report, "fallbacks")
    assert report["calls"] == routes.total()
    assert report["fallbacks"] == reasons.total()
    if case.unreached:
        return
    on_varlen = sum(routes[route] for route in VARLEN)
    masked = sum(call.hides or call.biased for call in log.calls)
    refused = reasons.total() - reasons[NO_CALL]
    assert on_varlen + routes["dense"] + refused == len(log.calls) - case.outside
    assert masked - case.outside <= on_varlen + refused <= masked
    if case.refusal is None:
        assert report["fallbacks"] == 0
    distinct = {call.content for call in log.calls if call.mask}
    assert report["plans"]["made"] <= len(distinct) + (case.name in EQUAL_MASKS)


def test_a_bias_is_not_taken_for_that_of_a_layer_where_it_is_zero() -> None:
    """RFD4 adds a bias that depends on each layer's weights; only the layers' masks are equal."""
    if "rfd4_proteina" not in BY_NAME:
        pytest.skip("this diffusers has no RFD4 Proteina")
    case = BY_NAME["rfd4_proteina"]
    model = case.build()
    first = next(m for m in model.modules() if hasattr(m, "to_bias"))
    nn.init.zeros_(first.to_bias.weight)
    default = case.run(model, "all_true")
    enable(model, case)
    torch.testing.assert_close(case.run(model, "all_true"), default)
    report = coverage(model)
    assert (report.calls, report.fallbacks) == (1, 1)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.refusal], ids=lambda case: case.name
)
def test_a_refused_call_raises_if_fallback_is_an_error(case: Case) -> None:
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="error")
    with pytest.raises(FA3Error, match=case.refusal.reason):
        case.run(model, case.layouts[-1])


@every_case
def test_disabling_gives_back_the_same_processors_and_the_same_output(case: Case) -> None:
    model = case.build()
    layout = case.layouts[-1]
    before, default = processors(model), case.run(model, layout)
    assert before

    enable(model, case)
    case.run(model, layout)
    during = processors(model)
    assert during.keys() == before.keys()
    for name, processor in during.items():
        assert processor is not before[name]
        assert isinstance(processor, type(before[name]))

    disable_fa3(model)
    after = processors(model)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(case.run(model, layout), default)


@every_case
def test_state_dict_stays_the_same_while_enabled(case: Case) -> None:
    model = case.build()
    before = model.state_dict()
    enable(model, case)
    assert all(isinstance(p, FA3AttnProcessor) for p in processors(model).values())
    during = model.state_dict()
    assert list(during) == list(before)
    assert all(during[name].data_ptr() == before[name].data_ptr() for name in before)


@pytest.mark.parametrize(
    "name",
    [n for n in ("chroma", "flux", "krea2", "pixart", "qwenimage", "unet_sd15") if n in BY_NAME],
)
def test_one_prompt_after_another_each_gets_its_own_mask(name: str) -> None:
    case, model = BY_NAME[name], BY_NAME[name].build()
    defaults = {layout: case.run(model, layout) for layout in case.layouts}
    enable(model, case)
    for layout in (*case.layouts, *reversed(case.layouts)):
        assert_within_budget(case.run(model, layout), defaults[layout], case.exact(layout))
    assert_on_the_kernel(model, case)
    assert any(total(coverage(model).to_dict(), "calls")[route] for route in VARLEN)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        (name, mask)
        for name, mask in (
            ("qwenimage", "encoder_hidden_states_mask"),
            ("lumina2", "encoder_attention_mask"),
        )
        if name in BY_NAME
    ],
)
def test_each_prompt_of_a_ragged_batch_gives_what_it_gives_alone(name: str, mask: str) -> None:
    case = BY_NAME[name]
    batch = case.inputs("ragged", 0.0)
    model, exact = case.build(), case.build(torch.float64)
    enabled = case.build()
    enable(enabled, case)
    together = case.run(enabled, "ragged")
    assert_on_the_kernel(enabled, case)
    assert any(total(coverage(enabled).to_dict(), "calls")[route] for route in VARLEN)

    for i in range(BATCH):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        length = int(alone[mask].sum())
        for key in ("encoder_hidden_states", mask):
            alone[key] = alone[key][:, :length]
        with torch.no_grad():
            default = model(**alone, return_dict=False)[0]
            reference = exact(**cast(alone, torch.float64), return_dict=False)[0]
        assert_within_budget(together[i : i + 1], default, reference)


@every_case
def test_bfloat16_is_as_close_as_the_default_in_bfloat16(case: Case) -> None:
    model = case.build(torch.bfloat16)
    layout = case.layouts[-1]
    default = case.run(model, layout)
    enable(model, case)
    assert_within_budget(case.run(model, layout), default, case.exact(layout))
    assert_on_the_kernel(model, case)
