"""Any call of `attention` is PyTorch's, or is refused where it must be, and writes only `out`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from diffusers_fa3 import FallbackWarning, MaskError, attention

from . import tried
from .calls import Call, Planned, some_calls, some_planned_calls
from .contents import key_padding, row_patterns
from .expected import assert_close_as, formula, largest, logits
from .tensors import DISJOINT, LAYOUTS


def check(call: Call, output: Tensor) -> None:
    assert_close_as(call.default(), output, call.exact(), largest(call.qkv.tensors[2]))
    assert not output[call.rows_without_keys()].any()


def on_kernel(call: Call, **options: object) -> Any:
    """What the reference gives, or None where it may refuse and does."""
    try:
        result = attention(
            *call.qkv.tensors, call.given(), kernel="reference", **call.options, **options
        )
    except MaskError:
        if call.verdict == "served":
            raise
        return None
    assert call.verdict != "refused"
    return result


@tried(6)
@given(call=some_calls())
def test_a_kernel_serves_what_it_must_and_is_exact(call: Call) -> None:
    output = on_kernel(call)
    if output is not None:
        check(call, output)


@tried(3)
@given(call=some_calls())
def test_auto_serves_the_same_and_the_default_the_rest_with_a_warning(call: Call) -> None:
    q, k, v = call.qkv.tensors
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = attention(q, k, v, call.given(), **call.options)
    fell_back = bool(caught)
    assert all(warning.category is FallbackWarning for warning in caught)
    assert call.verdict == "either" or fell_back == (call.verdict == "refused")
    if fell_back:
        assert torch.equal(output, call.default())
    else:
        check(call, output)


@tried(3)
@given(planned=some_planned_calls())
def test_a_plan_made_beforehand_is_exact_on_every_route(planned: Planned) -> None:
    check(planned.call, planned.attention(*planned.call.qkv.tensors))


@tried(3)
@given(call=some_calls() | some_calls(row_patterns), layout=st.sampled_from(DISJOINT))
def test_out_gets_the_result_and_nothing_around_it_is_written(call: Call, layout: str) -> None:
    q, k, v = call.qkv.tensors
    shape = (*q.shape[:3], v.shape[3])
    memory_shape = LAYOUTS[layout].memory(*shape)
    size, guard = torch.Size(memory_shape).numel(), 5
    buffer = torch.full((size + 2 * guard,), 7.0, dtype=q.dtype)
    within = torch.zeros(size + 2 * guard, dtype=torch.bool)
    out, its_place = (
        LAYOUTS[layout].view(x[guard : guard + size].view(memory_shape), *shape)
        for x in (buffer, within)
    )
    its_place.fill_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        expected = attention(q, k, v, call.given(), **call.options)
        assert attention(q, k, v, call.given(), out=out, **call.options) is out
    assert torch.equal(out, expected)
    assert (buffer[~within] == 7).all()


@tried(2)
@given(call=some_calls())
def test_the_log_sum_exp_is_that_of_the_keys_seen(call: Call) -> None:
    result = on_kernel(call, return_lse=True)
    if result is None:
        return
    output, lse = result
    check(call, output)
    exact = logits(*call.qkv.wide()[:2], call.mask, **call.options)
    size = largest(exact.masked_fill(exact == -torch.inf, 0.0))
    assert lse.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        lse, exact.logsumexp(-1).float(), rtol=8 * eps, atol=16 * eps * (1 + size)
    )


GARBAGE = (torch.nan, torch.inf, -torch.inf, 6e4)


@tried(5)
@given(planned=some_planned_calls(layouts=DISJOINT), garbage=st.sampled_from(GARBAGE))
def test_garbage_that_nobody_sees_changes_no_bit(planned: Planned, garbage: float) -> None:
    qkv = planned.call.qkv
    clean = planned.attention(*qkv.tensors)
    q, k, v = qkv.seen_in(tuple(memory.clone() for memory in qkv.memories))
    unseen = ~planned.seen.any(1)
    k[unseen] = v[unseen] = garbage
    q[~planned.seen.any(2)] = garbage
    assert torch.equal(planned.attention(q, k, v), clean)


@tried(1)
@given(
    call=some_calls(key_padding, (torch.float64, torch.float32))
    | some_calls(row_patterns, (torch.float64, torch.float32))
)
def test_gradients_are_those_of_the_formula(call: Call) -> None:
    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [memory.to(dtype, copy=True).requires_grad_() for memory in call.qkv.memories]
        output = function(*call.qkv.seen_in(tuple(leaves)))
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        return torch.autograd.grad((output * weight.to(dtype)).sum(), leaves)

    assume(call.verdict == "served")
    dtype = call.qkv.memories[0].dtype
    exact = gradients(lambda q, k, v: formula(q, k, v, call.mask, **call.options), torch.float64)
    ours = gradients(
        lambda q, k, v: attention(q, k, v, call.given(), kernel="reference", **call.options), dtype
    )
    size = max(map(largest, exact))
    for got, expected in zip(ours, exact):
        torch.testing.assert_close(
            got.double(), expected, rtol=0, atol=256 * torch.finfo(dtype).eps * size
        )
