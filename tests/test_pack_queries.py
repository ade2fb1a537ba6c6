"""Padded tokens are left out as queries if the user asks for it and nothing reads their rows."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from zoo import CASES, MISSING, Case, Layout
from zoo.budget import assert_within_budget
from zoo.case import key_mask

from diffusers_fa3 import (
    InputError,
    PackingPlan,
    UnsupportedModelError,
    attention,
    enable_fa3,
    plan_packing,
)
from diffusers_fa3.layers.frame import running
from diffusers_fa3.layers.pads import PADS_UNREAD
from diffusers_fa3.layers.processor import record_of

PADDED: tuple[Layout, ...] = ("right", "left", "ragged", "gap")
LISTED = [case for case in CASES if case.model.__name__ in PADS_UNREAD]
RUNS = [(case, layout) for case in LISTED for layout in case.layouts if layout in PADDED]

every_run = pytest.mark.parametrize(
    ("case", "layout"), RUNS, ids=[f"{case.name}-{layout}" for case, layout in RUNS]
)


def switched(case: Case, pack_queries: bool) -> nn.Module:
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="error", pack_queries=pack_queries)
    return model


@every_run
def test_the_output_of_a_listed_model_stays_the_same(
    case: Case, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.plans, "verify", True)
    default = case.run(case.build(), layout)
    output = case.run(switched(case, pack_queries=True), layout)
    assert_within_budget(output, default, case.exact(layout))


def test_every_listed_model_has_fewer_queries_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, pack = 0, PackingPlan.pack

    def count(plan: PackingPlan, q: torch.Tensor, *kv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal queries
        packed = pack(plan, q, *kv)
        queries += packed[0].numel()
        return packed

    monkeypatch.setattr(PackingPlan, "pack", count)
    fewer: dict[str, bool] = defaultdict(bool)
    for case, layout in RUNS:
        counts = []
        for pack_queries in (False, True):
            queries = 0
            case.run(switched(case, pack_queries), layout)
            counts.append(queries)
        assert counts[1] <= counts[0]
        fewer[case.model.__name__] |= counts[1] < counts[0]
    assert all(fewer.values()), fewer
    assert MISSING or fewer.keys() == PADS_UNREAD.keys()


def test_layers_that_are_not_listed_keep_their_queries() -> None:
    """With as many image as text tokens, lengths do not tell cross from self attention."""
    (case,) = (case for case in LISTED if case.name == "hunyuan_video")
    model = switched(case, pack_queries=True)
    packs = {name: record_of(m.processor).pack_queries for name, m in attention_layers(model)}
    assert {name.partition(".")[0] for name, asked in packs.items() if asked} == {
        "transformer_blocks",
        "single_transformer_blocks",
    }
    assert not all(packs.values())


def attention_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "processor")]


def test_copies_of_a_model_do_the_same() -> None:
    model = switched(LISTED[0], pack_queries=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert any(record_of(m.processor).pack_queries for _, m in attention_layers(twin))


def test_a_model_that_may_read_its_padding_is_refused_and_left_alone() -> None:
    (case,) = (case for case in CASES if case.name == "flux")
    model = case.build()
    with pytest.raises(UnsupportedModelError, match=r"QwenImage.*got FluxTransformer2DModel"):
        enable_fa3(model, kernel="reference", pack_queries=True)
    assert isinstance(model, FluxTransformer2DModel)
    assert all(record_of(m.processor) is None for _, m in attention_layers(model))


@pytest.mark.parametrize("layout", PADDED)
def test_rows_of_padded_queries_are_zero_and_the_others_right(layout: Layout) -> None:
    q, k, v = torch.randn(3, 2, 12, 4, 8)
    mask = key_mask(layout)
    sizes = {"batch": 2, "q_len": 12, "k_len": 12}
    plan = plan_packing(mask, **sizes, pack_queries=True)
    result = attention(q, k, v, plan, kernel="reference")
    expected = attention(q, k, v, mask, kernel="reference")
    torch.testing.assert_close(result, expected * mask[:, :, None, None])
    assert plan.cu_seqlens_q.equal(plan.cu_seqlens_k)


def test_a_mask_without_padding_packs_nothing() -> None:
    plan = plan_packing(torch.ones(2, 5).bool(), batch=2, q_len=5, k_len=5, pack_queries=True)
    assert plan.route == "dense"


def test_padding_that_is_masked_for_every_query_is_packed_however_it_is_written() -> None:
    mask = key_mask("gap")
    plans = [
        plan_packing(m, batch=2, q_len=12, k_len=12, pack_queries=True)
        for m in (mask, mask[:, None, None].repeat(1, 1, 12, 1))
    ]
    assert plans[0].indices_q.equal(plans[1].indices_q)


def test_cross_attention_has_no_padded_queries() -> None:
    with pytest.raises(InputError, match=r"self attention.*q_len 3, k_len 5"):
        plan_packing(torch.ones(2, 5).bool(), batch=2, q_len=3, k_len=5, pack_queries=True)
