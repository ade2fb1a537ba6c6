"""Masks in two factors act as the mask laid out, and are never laid out for a plan."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES, Case
from zoo.budget import assert_within_budget

from diffusers_fa3 import MaskError, attention, coverage, disable_fa3, enable_fa3, plan_packing
from diffusers_fa3.masks.outer import OuterMask, SpreadMask, sources_of
from diffusers_fa3.masks.plan_cache import PlanCache

B, S = 2, 6
VALID = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1]], dtype=torch.bool)

CHROMA_AND_HUNYUAN = [case for case in CASES if case.name.startswith(("chroma", "hunyuan_video15"))]
every_case = pytest.mark.parametrize("case", CHROMA_AND_HUNYUAN, ids=lambda case: case.name)


def chroma(mask: Tensor) -> Tensor:
    return mask[:, None, None, :] * mask[:, None, :, None]


def hunyuan(mask: Tensor) -> Tensor:
    mask = F.pad(mask, (3, 0), value=True).bool()
    keys = mask.view(B, 1, 1, S + 3).repeat(1, 1, S + 3, 1)
    return (keys & keys.transpose(2, 3)).bool()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [chroma, hunyuan])
def test_what_a_block_makes_of_its_mask_stays_two_factors(
    make: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    factors, plain = make(VALID.to(dtype).as_subclass(SpreadMask)), make(VALID.to(dtype))
    assert isinstance(factors, OuterMask)
    assert (factors.shape, factors.dtype) == (plain.shape, plain.dtype)
    assert torch.equal(factors, plain)
    assert type(factors[:1]) is Tensor
    q = torch.randn(B, 2, plain.shape[-1], 8, dtype=dtype if dtype.is_floating_point else None)
    assert torch.equal(
        F.scaled_dot_product_attention(q, q, q, attn_mask=factors),
        F.scaled_dot_product_attention(q, q, q, attn_mask=plain),
    )


@pytest.mark.parametrize(
    "operation",
    [
        lambda m: m[:, None, None, :] & m[:, None, None, :],
        lambda m: m.view(B, 1, 1, S).repeat(1, 1, S, 1) & m.view(B, 1, 1, S).repeat(1, 1, S, 1),
        lambda m: m[:, None, None, :].repeat(2, 1, 3, 2),
        lambda m: m[:, None, :, None] & m[:, None, None, :].repeat(1, 1, S, 1),
        lambda m: m & m,
        lambda m: ~m,
        lambda m: m.float() * 2,
        lambda m: m.sum(-1),
        lambda m: F.pad(m.float(), (1, 1)),
    ],
)
def test_any_other_operation_is_as_on_a_plain_mask(operation: Callable[[Tensor], Tensor]) -> None:
    result, plain = operation(VALID.as_subclass(SpreadMask)), operation(VALID)
    assert (result.shape, result.dtype) == (plain.shape, plain.dtype)
    assert torch.equal(result, plain)


@pytest.mark.parametrize("make", [chroma, hunyuan])
def test_a_plan_is_that_of_the_mask_laid_out(
    make: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make(VALID)
    sizes = {"batch": B, "q_len": plain.shape[-1], "k_len": plain.shape[-1], "heads": 2}
    expected = plan_packing(plain, **sizes)
    monkeypatch.setattr(OuterMask, "laid_out", None)
    plan = plan_packing(make(VALID.as_subclass(SpreadMask)), **sizes)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "indices_q", "indices_k"):
        assert torch.equal(getattr(plan, name), getattr(expected, name))
    everything = torch.ones_like(VALID).as_subclass(SpreadMask)
    assert plan_packing(make(everything), **sizes).route == "dense"


def test_a_product_of_floats_is_a_bias_whatever_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OuterMask, "laid_out", None)
    with pytest.raises(MaskError, match="float32 mask with values that are a bias"):
        plan_packing(chroma(VALID.float().as_subclass(SpreadMask)), batch=B, q_len=S, k_len=S)


@every_case
def test_a_model_on_the_kernel_lays_out_nothing_and_plans_once(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case.build()
    default = case.run(model, "ragged")
    enable_fa3(model, kernel="reference", fallback="error", layers=r"^(single_)?transformer_blocks")
    in_factors: list[OuterMask] = []
    monkeypatch.setattr(OuterMask, "__init__", lambda mask, *factors: in_factors.append(mask))
    monkeypatch.setattr(OuterMask, "laid_out", None)
    output = case.run(model, "ragged")
    assert_within_budget(output, default, case.exact("ragged"))
    report = coverage(model)
    assert report.plans_made == 1
    assert report.calls == sum(row.kernel == "reference" for row in report.rows)
    assert len(in_factors) == report.calls


@every_case
def test_where_no_kernel_serves_the_default_gets_its_mask(case: Case) -> None:
    model = case.build()
    default = case.run(model, "ragged")
    enable_fa3(
        model, kernel="reference", fallback="silent", layers=r"^(single_)?transformer_blocks"
    )
    for layer in model.modules():
        if hasattr(layer, "processor"):
            layer.processor._attention_backend = "native"
    assert torch.equal(case.run(model, "ragged"), default)
    assert coverage(model).calls == 0


@every_case
def test_the_hooks_go_with_the_switch(case: Case) -> None:
    model = case.build()
    assert hooks(model) == 0
    enable_fa3(model)
    once = hooks(model)
    assert once > 0
    enable_fa3(model)
    assert hooks(model) == once
    assert hooks(copy.deepcopy(model)) == once
    disable_fa3(model)
    assert hooks(model) == 0


def test_other_models_get_no_hooks() -> None:
    case = next(case for case in CASES if case.name == "flux")
    model = case.build()
    enable_fa3(model)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.logical_not_(),
        lambda m: m.masked_fill_(torch.eye(S, dtype=torch.bool), True),
        lambda m: m[0].fill_(True),
        lambda m: m[..., 2:].logical_not_(),
        lambda m: m.transpose(2, 3)[:, :, 0].fill_(False),
        lambda m: torch.logical_not(m, out=m),
        lambda m: m.__setitem__((0, 0, 3), True),
    ],
)
def test_a_mask_that_is_edited_is_what_it_was_made(edit: Callable[[Tensor], Tensor]) -> None:
    mask, plain = chroma(VALID.as_subclass(SpreadMask)), chroma(VALID)
    q = torch.randn(B, S, 2, 8)
    assert isinstance(mask, OuterMask)
    for _ in range(2):  # the plan made first must not be reused for the edited mask
        edit(mask)
        edit(plain)
        assert torch.equal(mask, plain)
        assert torch.equal(attention(q, q, q, mask), attention(q, q, q, plain))


def test_a_plan_of_an_edited_mask_is_not_found_again() -> None:
    mask = chroma(VALID.as_subclass(SpreadMask))
    plans = PlanCache()
    longest = []
    for _ in range(3):
        plan, made = plans.find(
            sources_of(mask), "", lambda: plan_packing(mask, batch=B, q_len=S, k_len=S)
        )
        assert made
        longest.append(plan.max_seqlen_k)
        mask[:, :, :, :3] = True
        mask.mul_(torch.tensor(len(longest) == 1))
    assert longest == [4, 5, 0]


def test_a_factor_that_is_edited_is_refused() -> None:
    valid = VALID.clone()
    mask = chroma(valid.as_subclass(SpreadMask))
    valid[0, 2] = True
    for use in (mask.clone, lambda: plan_packing(mask, batch=B, q_len=S, k_len=S)):
        with pytest.raises(MaskError, match="edited in place after it was multiplied"):
            use()
