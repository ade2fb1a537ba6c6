"""Where diffusers gives a switched layer another processor, `coverage` says so."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
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
from torch import nn
from zoo import Case
from zoo.budget import assert_within_budget

from diffusers_fa3 import FallbackWarning, coverage, disable_fa3, enable_fa3

LAYOUT = "ragged"
SD3 = replace(
    BY_NAME["sd3"],
    # with dual attention, diffusers cannot run fused projections
    config={**BY_NAME["sd3"].config, "dual_attention_layers": ()},
    layouts=(LAYOUT,),
)


def fused(model: nn.Module) -> nn.Module:
    model.fuse_qkv_projections()
    return model


def unfused(model: nn.Module) -> nn.Module:
    model.unfuse_qkv_projections()
    return model


def given_one_for_all(model: nn.Module) -> nn.Module:
    model.set_attn_processor(AttnProcessor2_0())
    return model


def given_one_for_each(model: nn.Module) -> nn.Module:
    model.set_attn_processor({name: FluxAttnProcessor() for name in model.attn_processors})
    return model


def given_one_to_a_layer(model: nn.Module) -> nn.Module:
    model.transformer_blocks[0].attn.processor = FluxAttnProcessor()
    return model


def on_their_oldest_processors(model: nn.Module) -> nn.Module:
    model.set_default_attn_processor()
    return model


def sliced(model: nn.Module) -> nn.Module:
    model.set_attention_slice("auto")
    return model


REPLACED: list[tuple[Case, Treatment, int]] = [
    (BY_NAME["unet_sd15"], fused, 8),
    (BY_NAME["unet_sd15"], given_one_for_all, 8),
    (SD3, fused, 2),
    (BY_NAME["flux"], given_one_for_each, 2),
    (BY_NAME["flux"], given_one_to_a_layer, 1),
]
"""A case, what is done to its model, and how many layers then have another processor."""

OUT_OF_REACH: list[Treatment] = [on_their_oldest_processors, sliced]
"""Processors that compute attention by hand."""


def name_of(value: object) -> str:
    return value.name if isinstance(value, Case) else getattr(value, "__name__", "")


every_replacement = pytest.mark.parametrize(("case", "treat", "number"), REPLACED, ids=name_of)


@every_replacement
def test_coverage_tells_of_other_processors_and_switching_again_mends_it(
    case: Case, treat: Treatment, number: int
) -> None:
    expected = expect(case, LAYOUT, treat)
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="error")
    run(case, model, LAYOUT)
    assert not any(row.replaced for row in coverage(model).rows)

    treat(model)
    own, left = processors(model), switched(model)
    assert_within_budget(run(case, model, LAYOUT), expected.output, expected.exact)
    report = coverage(model)
    replaced = {row.name for row in report.rows if row.replaced}
    assert len(replaced) == number
    assert replaced == processors(model).keys() - left
    for row in report.rows:
        assert row.kernel == ("default" if row.replaced else "reference")
        assert bool(row.calls) == (not row.replaced)
    for rows in (report.to_dict()["layers"], coverage(copy.deepcopy(model)).to_dict()["layers"]):
        assert {row["name"] for row in rows if row["replaced"]} == replaced
    lines = str(report).splitlines()
    assert any(line.split()[-2:] == ["default", "replaced"] for line in lines)
    assert lines[-1] == (
        f"{number} layers were given other processors: enable_fa3 switches them again"
    )

    enable_fa3(model, kernel="reference", fallback="error")
    assert not any(row.replaced for row in coverage(model).rows)
    assert_on_the_kernel(case, model, LAYOUT, expected)
    disable_fa3(model)
    assert processors(model).keys() == own.keys()
    assert all(processors(model)[name] is own[name] for name in replaced)
    assert not any(row.replaced for row in coverage(model).rows)


@every_replacement
def test_switching_after_that_is_switching_as_ever(
    case: Case, treat: Treatment, number: int
) -> None:
    expected = expect(case, LAYOUT, treat)
    model = treat(case.build())
    before = processors(model)
    _, *table = str(coverage(model)).splitlines()[:-1]
    assert all(line.split()[-3:] == ["default", "not", "switched"] for line in table)
    enable_fa3(model, kernel="reference", fallback="error")
    assert_on_the_kernel(case, model, LAYOUT, expected)
    disable_fa3(model)
    assert_same_objects(model, before)


def test_layers_that_were_not_selected_are_not_called_replaced() -> None:
    model = BY_NAME["flux"].build()
    enable_fa3(model, kernel="reference", layers="^single")
    given_one_for_each(model)
    assert [row.replaced for row in coverage(model).rows] == [False, True]


@pytest.mark.parametrize("treat", OUT_OF_REACH, ids=name_of)
def test_processors_that_compute_by_hand_stay_on_the_default_attention_and_are_told(
    treat: Treatment,
) -> None:
    case = BY_NAME["unet_sd15"]
    expected = expect(case, LAYOUT, treat)
    model = case.build()
    enable_fa3(model, kernel="reference")
    treat(model)
    assert all(row.replaced for row in coverage(model).rows)
    enable_fa3(model, kernel="reference")
    with pytest.warns(FallbackWarning, match="makes no attention call that could be switched"):
        assert torch.equal(run(case, model, LAYOUT), expected.output)
    report = coverage(model)
    assert (report.calls, report.fallbacks) == (0, 8)


# --- fused projections, and back -----------------------------------------------------------------


def test_unfusing_brings_back_the_processors_as_they_were_when_it_was_fused() -> None:
    """diffusers keeps the earlier processors; they are switched if fusing came after the switch."""
    case = BY_NAME["unet_sd15"]
    expected = expect(case, LAYOUT)
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="error")
    assert_on_the_kernel(case, model, LAYOUT, expected)
    unfused(fused(model))
    assert not any(row.replaced for row in coverage(model).rows)
    assert_on_the_kernel(case, model, LAYOUT, expected)
    assert coverage(model).calls == 2 * expected.calls


def test_unfusing_what_was_fused_before_the_switch_takes_the_switch_back() -> None:
    case = BY_NAME["unet_sd15"]
    model = case.build()
    before = processors(model)
    enable_fa3(fused(model), kernel="reference", fallback="error")
    unfused(model)
    assert_same_objects(model, before)
    assert all(row.replaced for row in coverage(model).rows)
    enable_fa3(model, kernel="reference", fallback="error")
    assert_on_the_kernel(case, model, LAYOUT, expect(case, LAYOUT))


@pytest.mark.parametrize("name", ["flux", "qwenimage"])
def test_layers_that_fuse_by_themselves_keep_their_switch(name: str) -> None:
    """Newer layers of diffusers fuse their projections, and keep their processors."""
    case = BY_NAME[name]
    model = case.build()
    before = processors(model)
    enable_fa3(model, kernel="reference", fallback="error")
    assert_on_the_kernel(case, fused(model), LAYOUT, expect(case, LAYOUT, fused))
    assert list(model.state_dict()) == list(fused(case.build()).state_dict())
    assert_on_the_kernel(case, unfused(model), LAYOUT, expect(case, LAYOUT))
    disable_fa3(model)
    assert_same_objects(model, before)
    enable_fa3(fused(model), kernel="reference", fallback="error")
    assert_on_the_kernel(case, model, LAYOUT, expect(case, LAYOUT, fused))
