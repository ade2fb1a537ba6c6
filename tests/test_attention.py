"""`attention` equals SDPA with the same mask, on the route that the mask allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from zoo.budget import assert_within_budget

from diffusers_fa3 import (
    FallbackWarning,
    InputError,
    KernelUnavailableError,
    MaskError,
    attention,
    flash_attn_varlen_func,
    plan_packing,
)
from diffusers_fa3.attention import Declined, Served, attend

B, SQ, SK, H, D = 3, 7, 12, 4, 16

PADDINGS = {
    "none": None,
    "all true": torch.ones(B, SK, dtype=torch.bool),
    "right": torch.arange(SK) < torch.tensor([[12], [5], [1]]),
    "left": torch.arange(SK) >= torch.tensor([[0], [5], [11]]),
    "gap": (torch.arange(SK) < 3) | (torch.arange(SK) >= torch.tensor([[4], [8], [11]])),
    "scattered": torch.arange(B * SK).view(B, SK) % 5 != 1,
    "an empty sample": torch.arange(SK) < torch.tensor([[4], [0], [9]]),
}
ROUTES = {
    "none": "dense",
    "all true": "dense",
    "right": "seqused",
    "left": "packed",
    "gap": "packed",
    "scattered": "packed",
    "an empty sample": "seqused",
}


@dataclass(frozen=True)
class Tensors:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def to(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q.to(dtype), self.k.to(dtype), self.v.to(dtype)


def tensors(
    *, q_len: int = SQ, k_len: int = SK, k_heads: int = H, v_dim: int = D, seed: int = 0
) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return Tensors(
        torch.randn(B, q_len, H, D, generator=generator),
        torch.randn(B, k_len, k_heads, D, generator=generator),
        torch.randn(B, k_len, k_heads, v_dim, generator=generator),
    )


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, **options: object
) -> torch.Tensor:
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped, **options)
    return out.transpose(1, 2)


def check(x: Tensors, mask: torch.Tensor | None, dtype: torch.dtype, **options: object) -> None:
    output = attention(*x.to(dtype), mask, kernel="reference", **options)
    names = {"causal": "is_causal"}
    options = {names.get(name, name): value for name, value in options.items()}
    default = sdpa(*x.to(dtype), mask, **options)
    wide = tuple(part.double() for part in x.to(dtype))
    assert_within_budget(output, default, sdpa(*wide, mask, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_every_padding_is_exact(padding: str, dtype: torch.dtype) -> None:
    check(tensors(), PADDINGS[padding], dtype)


@pytest.mark.parametrize("padding", PADDINGS)
def test_every_padding_goes_its_route(padding: str) -> None:
    answer = attend(
        *tensors().to(torch.float32),
        PADDINGS[padding],
        scale=None,
        causal=False,
        kernel="reference",
    )
    assert isinstance(answer, Served)
    assert (answer.kernel, answer.route) == ("reference", ROUTES[padding])


@pytest.mark.parametrize("k_heads", [1, 2])
def test_grouped_heads_are_not_expanded(k_heads: int) -> None:
    check(tensors(k_heads=k_heads), PADDINGS["gap"], torch.float32)


def test_v_may_have_another_head_size() -> None:
    check(tensors(v_dim=24), PADDINGS["gap"], torch.float32)


def test_a_scale_is_used() -> None:
    check(tensors(), PADDINGS["gap"], torch.float32, scale=0.7)


def test_causal_without_a_mask() -> None:
    check(tensors(q_len=SK), None, torch.float32, causal=True)


def test_masked_queries_give_zero_rows_as_sdpa_does() -> None:
    valid = PADDINGS["scattered"]
    assert valid is not None
    outer = valid[:, None, :, None] & valid[:, None, None, :]
    check(tensors(q_len=SK), outer, torch.float32)
    output = attention(*tensors(q_len=SK).to(torch.float32), outer, kernel="reference")
    assert torch.equal(output[~valid], torch.zeros_like(output[~valid]))


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("padding", ["right", "left", "gap", "an empty sample"])
def test_what_lies_at_padded_keys_never_matters(padding: str, garbage: float) -> None:
    mask = PADDINGS[padding]
    assert mask is not None
    q, k, v = tensors().to(torch.float32)
    clean = attention(q, k, v, mask, kernel="reference")
    k, v = (x.masked_fill(~mask[:, :, None, None], garbage) for x in (k, v))
    assert torch.equal(attention(q, k, v, mask, kernel="reference"), clean)


def weighing_padding_by_0(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, softmax_scale):
    """Weighs values of padding in a last tile of 16 keys by 0, as FlashAttention-3 does; fp32."""
    out = torch.zeros(*q.shape[:2], v.shape[2])
    samples = zip(*(ends.tolist() for ends in (cu_seqlens_q, cu_seqlens_k)), strict=True)
    begins_q, begins_k = next(samples)
    for (end_q, end_k), used in zip(samples, seqused_k.tolist(), strict=True):
        of_q, of_k = slice(begins_q, end_q), slice(begins_k, begins_k + 16)
        begins_q, begins_k = end_q, end_k
        if used:
            logits = torch.einsum("qhd,khd->hqk", q[of_q], k[of_k]) * softmax_scale
            logits[..., used:] = -torch.inf
            out[of_q] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[of_k])
    return out


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_a_kernel_that_weighs_padding_by_0_is_not_given_any(garbage: float, static: bool) -> None:
    mask = PADDINGS["an empty sample"]
    assert mask is not None
    plan = plan_packing(mask, batch=B, q_len=SQ, k_len=SK, static=static)
    q, k, v = tensors().to(torch.float32)
    expected = attention(q, k, v, mask, kernel="reference")
    v = v.masked_fill(~mask[:, :, None, None], garbage)
    got = attention(q, k, v, plan, kernel=weighing_padding_by_0)
    torch.testing.assert_close(got, expected)


def test_nor_by_the_public_function_which_no_plan_was_made_for() -> None:
    mask = PADDINGS["an empty sample"]
    assert mask is not None
    q, k, v = tensors().to(torch.float32)
    expected = attention(q, k, v, mask, kernel="reference")
    v = v.masked_fill(~mask[:, :, None, None], torch.nan)
    got = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)),
        *(torch.arange(B + 1, dtype=torch.int32) * length for length in (SQ, SK)),
        *(SQ, SK),
        seqused_k=mask.sum(-1, dtype=torch.int32),
        kernel=weighing_padding_by_0,
    )
    torch.testing.assert_close(got.view_as(q), expected)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**16),
    bits=st.lists(st.booleans(), min_size=B * SK, max_size=B * SK),
    additive=st.sampled_from([None, -torch.inf, -1e4]),
    spread=st.sampled_from([(B, SK), (B, 1, 1, SK), (B, H, 1, SK), (B, 1, SQ, SK), (B, H, SQ, SK)]),
    heads_first=st.booleans(),
)
def test_any_key_padding_is_exact(
    seed: int,
    bits: list[bool],
    additive: float | None,
    spread: tuple[int, ...],
    heads_first: bool,
) -> None:
    keys = torch.tensor(bits).view(B, SK)
    if additive == -1e4:
        keys[:, 0] = True  # the default attention averages over a row of -1e4 only
    mask = keys if len(spread) == 2 else keys[:, None, None].expand(spread)
    if additive is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, additive)
    x = tensors(seed=seed)
    if heads_first:
        x = Tensors(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v)))
    output = attention(x.q, x.k, x.v, mask, kernel="reference")
    wide = mask.double() if mask.is_floating_point() else mask
    assert_within_budget(output, sdpa(x.q, x.k, x.v, mask), sdpa(*x.to(torch.float64), wide))


@pytest.mark.parametrize("padding", ["none", "right", "gap"])
def test_gradients_are_those_of_sdpa(padding: str) -> None:
    def gradients(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.requires_grad_() for x in tensors().to(dtype)]
        function(*inputs, PADDINGS[padding]).square().sum().backward()
        return [x.grad for x in inputs if x.grad is not None]

    exact = gradients(sdpa, torch.float64)
    default = gradients(sdpa, torch.float32)
    ours = gradients(lambda *args: attention(*args, kernel="reference"), torch.float32)
    assert len(ours) == 3
    for triple in zip(ours, default, exact):
        assert_within_budget(*triple)


# --- out and the log-sum-exp -------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
def test_out_receives_the_result_and_is_returned(padding: str) -> None:
    q, k, v = tensors().to(torch.float32)
    expected = attention(q, k, v, PADDINGS[padding], kernel="reference")
    out = torch.full((B, SQ, H, D), torch.nan)
    assert attention(q, k, v, PADDINGS[padding], kernel="reference", out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_log_sum_exp_is_of_the_valid_keys(padding: str) -> None:
    q, k, v = tensors().to(torch.float32)
    mask = PADDINGS[padding]
    out, lse = attention(q, k, v, mask, kernel="reference", return_lse=True)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * D**-0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    assert lse.shape == (B, H, SQ)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, logits.logsumexp(-1).float())
    assert_within_budget(out, sdpa(q, k, v, mask), sdpa(*tensors().to(torch.float64), mask))


def test_an_out_of_another_shape_is_refused_before_anything_runs() -> None:
    out = torch.full((B, SQ, H, D + 1), 7.0)
    with pytest.raises(InputError, match="out"):
        attention(*tensors().to(torch.float32), out=out)
    assert (out == 7).all()


def test_an_out_that_lies_in_k_is_refused() -> None:
    q, k, v = tensors().to(torch.float32)
    with pytest.raises(InputError, match="out"):
        attention(q, k, v, out=k[:, :SQ])


# --- plans made beforehand ---------------------------------------------------------------------


def test_a_plan_stands_for_the_mask_it_was_made_of() -> None:
    q, k, v = tensors().to(torch.float32)
    for mask in PADDINGS.values():
        plan = plan_packing(mask, batch=B, q_len=SQ, k_len=SK)
        expected = attention(q, k, v, mask, kernel="reference")
        assert torch.equal(attention(q, k, v, plan, kernel="reference"), expected)


@pytest.mark.parametrize("padding", [name for name in PADDINGS if name != "none"])
def test_a_static_plan_is_exact_too(padding: str) -> None:
    mask = PADDINGS[padding]
    assert mask is not None
    x = tensors()
    plan = plan_packing(mask, batch=B, q_len=SQ, k_len=SK, static=True)
    q, k, v = x.to(torch.float32)
    k, v = (t.masked_fill(~mask[:, :, None, None], torch.nan) for t in (k, v))
    output = attention(q, k, v, plan, kernel="reference")
    default = sdpa(*x.to(torch.float32), mask)
    assert_within_budget(output, default, sdpa(*x.to(torch.float64), mask))


def test_a_plan_for_other_sizes_is_refused() -> None:
    plan = plan_packing(PADDINGS["gap"], batch=B, q_len=SQ + 1, k_len=SK)
    with pytest.raises(MaskError, match=r"plan is for \(B, Sq, Sk\) = \(3, 8, 12\)"):
        attention(*tensors().to(torch.float32), plan)


# --- nothing to attend to ----------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "q_len", "k_len"), [(0, 7, 12), (3, 0, 12), (3, 7, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_emptiness_gives_zeros(batch: int, q_len: int, k_len: int, masked: bool) -> None:
    q, k = torch.randn(batch, q_len, H, D), torch.randn(batch, k_len, H, D)
    mask = torch.ones(batch, k_len, dtype=torch.bool) if masked else None
    out, lse = attention(q, k, k, mask, kernel="reference", return_lse=True)
    assert torch.equal(out, torch.zeros(batch, q_len, H, D))
    assert torch.equal(lse, torch.full((batch, H, q_len), -torch.inf))
    assert torch.equal(out, sdpa(q, k, k, None))


def test_emptiness_is_part_of_the_graph() -> None:
    q, k = torch.randn(2, 3, H, D, requires_grad=True), torch.randn(2, 0, H, D)
    attention(q, k, k).sum().backward()
    assert q.grad is not None
    assert torch.equal(q.grad, torch.zeros_like(q))


# --- what no kernel takes ----------------------------------------------------------------------

BIAS = torch.rand(B, H, SQ, SK)
SCATTER = torch.rand(B, 1, SQ, SK, generator=torch.Generator().manual_seed(0)) < 0.6


@pytest.mark.parametrize("mask", [BIAS, SCATTER, SCATTER.long()], ids=["bias", "scatter", "int"])
def test_auto_goes_to_pytorch_and_says_why(mask: torch.Tensor) -> None:
    q, k, v = tensors().to(torch.float32)
    with pytest.warns(FallbackWarning, match="PyTorch's attention serves: .*(bias|query)"):
        output = attention(q, k, v, mask)
    assert torch.equal(output, sdpa(q, k, v, mask if mask.is_floating_point() else mask.bool()))
    out = torch.empty_like(output)
    with pytest.warns(FallbackWarning):
        assert attention(q, k, v, mask, out=out) is out
    assert torch.equal(out, output)


def test_a_kernel_that_was_asked_for_does_not_fall_back() -> None:
    with pytest.raises(MaskError, match="depends on the query"):
        attention(*tensors().to(torch.float32), SCATTER, kernel="reference")


def test_a_log_sum_exp_does_not_fall_back() -> None:
    with pytest.raises(MaskError, match="bias"):
        attention(*tensors().to(torch.float32), BIAS, return_lse=True)


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KernelUnavailableError, match="reference"):
        attention(*tensors().to(torch.float32), kernel="no such kernel")


def test_a_declined_call_has_a_reason_of_one_line() -> None:
    answer = attend(
        *tensors().to(torch.float32), BIAS, scale=None, causal=False, kernel="reference"
    )
    assert isinstance(answer, Declined)
    assert "\n" not in answer.reason


# --- bad input ---------------------------------------------------------------------------------

FULL = torch.randn(2, 6, 4, 8)
BAD = {
    "3 axes": ((FULL[0], FULL[0], FULL[0]), r"4 axes \(B, S, H, D\); got q \(6, 4, 8\)"),
    "batch": ((FULL, FULL[:1], FULL[:1]), "one batch size"),
    "k and v lengths": ((FULL, FULL, FULL[:, :5]), "k and v are of one length"),
    "k and v heads": (
        (FULL, FULL, FULL[:, :, :2]),
        "k and v are of one length and number of heads",
    ),
    "head size": ((FULL, FULL[..., :4], FULL), "q and k are of one head size"),
    "heads": ((FULL, FULL[:, :, :3], FULL[:, :, :3]), "multiple of k's"),
    "dtype": ((FULL, FULL.half(), FULL.half()), "one dtype; got torch.float32, torch.float16"),
    "device": ((FULL, FULL.to("meta"), FULL.to("meta")), "one device; got cpu, meta, meta"),
}


@pytest.mark.parametrize(("inputs", "words"), BAD.values(), ids=BAD)
def test_tensors_that_do_not_belong_together_are_refused(
    inputs: tuple[torch.Tensor, ...], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        attention(*inputs)


def test_causal_with_another_number_of_keys_is_refused() -> None:
    with pytest.raises(InputError, match="causal needs as many queries as keys"):
        attention(*tensors().to(torch.float32), causal=True)


def test_causal_with_a_mask_is_refused() -> None:
    x = tensors(q_len=SK).to(torch.float32)
    with pytest.raises(InputError, match="no mask"):
        attention(*x, PADDINGS["right"], causal=True)


def test_a_mask_on_another_device_is_refused() -> None:
    mask = torch.ones(B, SK, dtype=torch.bool, device="meta")
    with pytest.raises(MaskError, match="got meta and cpu"):
        attention(*tensors().to(torch.float32), mask)


@pytest.mark.parametrize("shape", [(B, SK + 1), (B, 1, 1, SK - 1), (B + 1, 1, 1, SK)], ids=str)
def test_a_mask_that_does_not_broadcast_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MaskError, match="does not broadcast"):
        attention(*tensors().to(torch.float32), torch.ones(shape, dtype=torch.bool))


def test_a_good_call_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*tensors().to(torch.float32), PADDINGS["gap"])
