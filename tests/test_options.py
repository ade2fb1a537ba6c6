"""The records of a kernel call, and every function that takes them: one convention for all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from schemas import OPS

from diffusers_fa3 import KernelUnavailableError, attention, flash_attn_varlen_func, plan_packing
from diffusers_fa3.kernels import PROVIDERS
from diffusers_fa3.kernels.adapt import dense_as_packed, shielded
from diffusers_fa3.kernels.compiled import _traceable, forward_into
from diffusers_fa3.kernels.contract import Forward, InnerForward
from diffusers_fa3.kernels.providers import flash_attn_4, reference, torch_varlen
from diffusers_fa3.kernels.public_function import _forward, public_forward
from diffusers_fa3.kernels.raw_op import RawOp, differentiable
from diffusers_fa3.layers import calls
from diffusers_fa3.options import DENSE, Lengths, Options

RAW = RawOp(OPS["upstream"].op, "upstream")


def function(q, k, v, cu_seqlens_q=None, softmax_scale=None):
    """A function with a few of FlashAttention's arguments."""
    return q


def parameters(call: Callable[..., Any]) -> list[tuple[object, ...]]:
    """Name, kind and default of each, but for `self`."""
    found = inspect.signature(call).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name != "self"]


FORWARDS: dict[str, Forward] = {
    "reference": reference.forward,
    "raw op": RAW.forward,
    "differentiable": differentiable(RAW.forward, RAW.forward),
    "shielded": shielded(_forward(function)),
    "function": public_forward(function),
    "functions": public_forward(function, function),
    "flash_attn_4": flash_attn_4.bind(None, function, function),
    "traced": _traceable("reference", 0),
}
INNER: dict[str, InnerForward] = {
    "dense as packed": dense_as_packed(_forward(function)),
    "function": _forward(function),
    "torch_varlen": torch_varlen.Varlen.forward,
}


@pytest.mark.parametrize("name", FORWARDS)
def test_every_kernel_is_called_alike(name: str) -> None:
    assert parameters(FORWARDS[name]) == parameters(Forward.__call__)


@pytest.mark.parametrize("name", INNER)
def test_every_kernel_behind_a_shield_is_called_alike(name: str) -> None:
    assert parameters(INNER[name]) == parameters(InnerForward.__call__)


def test_what_is_behind_a_shield_lacks_the_word_of_padding_alone() -> None:
    behind = [p for p in parameters(Forward.__call__) if p[0] != "padding_is_safe"]
    assert parameters(InnerForward.__call__) == behind


def test_the_traced_op_takes_the_lengths_in_their_order() -> None:
    names = [argument.name for argument in forward_into._opoverload._schema.arguments]
    assert tuple(names[-len(Lengths._fields) :]) == Lengths._fields
    scores = names[-len(Lengths._fields) - 4 : -len(Lengths._fields)]
    assert scores == ["softmax_scale", "causal", "window_left", "window_right"]
    assert names[:5] == ["q", "k", "v", "out", "return_lse"]  # what its fake reads


def test_flash_attentions_own_function_has_every_option() -> None:
    names = {name for name, *_ in parameters(flash_attn_varlen_func)}
    assert names >= {*Lengths._fields} | {*Options._fields} - {"window"} | {"window_size"}


def test_what_stands_in_for_the_dispatcher_has_its_arguments() -> None:
    ours = [name for name, *_ in parameters(calls.dispatch_attention_fn)]
    theirs = [name for name, *_ in parameters(attention_dispatch.dispatch_attention_fn)]
    assert [name for name in theirs if name not in ours] == []
    assert [name for name in ours if name in theirs] == theirs


# --- options that are asked for, and those that are not -----------------------------------------


def test_an_option_that_asks_for_nothing_is_beyond_nobody() -> None:
    plain = Options(0.5, False, (-1, -1), 0.0, None, None, None)
    assert plain.beyond() == {}
    assert Options(0.5, causal=True).beyond("causal") == {}
    descale = torch.ones(1, 2)
    asked = Options(0.5, True, (3, -1), 0.0, k_descale=descale)
    assert asked.beyond() == {"causal": True, "window": (3, -1), "k_descale": descale}
    assert list(asked.beyond("causal", "k_descale")) == ["window"]
    assert list(Options(0.5, q_descale=torch.zeros(1, 2)).beyond()) == ["q_descale"]


REFUSES = {
    "reference": (FORWARDS["reference"], {"q_descale": torch.ones(1, 1)}),
    "flash_attn_4": (FORWARDS["flash_attn_4"], {"v_descale": torch.ones(1, 1)}),
    "function": (FORWARDS["function"], {"softcap": 2.0}),
    "traced": (FORWARDS["traced"], {"softcap": 2.0}),
}


@pytest.mark.parametrize("name", REFUSES)
def test_an_option_that_a_kernel_lacks_is_refused_by_name(name: str) -> None:
    forward, option = REFUSES[name]
    q = torch.randn(1, 3, 1, 8)
    (asked,) = option
    with pytest.raises(KernelUnavailableError, match=f"cannot take {asked}"):
        forward(q, q, q, Options(0.5, **option))


def test_a_scale_of_0_reaches_a_function() -> None:
    """It is no default: every key weighs the same."""
    q, k, v = torch.randn(3, 1, 5, 2, 8)
    scales = []

    def mine(q, k, v, softmax_scale=None):
        scales.append(softmax_scale)
        return reference.forward(q, k, v, Options(softmax_scale))[0]

    got = attention(q, k, v, scale=0.0, kernel=mine)
    assert scales == [0.0]
    torch.testing.assert_close(got, v.mean(1, keepdim=True).expand_as(v))


def test_a_plan_tells_what_its_lengths_do() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)
    plan = plan_packing(mask, batch=2, q_len=3, k_len=4)
    assert plan.cu_seqlens_q.tolist() == [0, 3, 6]
    assert plan.cu_seqlens_k.tolist() == [0, 3, 4]
    assert (plan.max_seqlen_q, plan.max_seqlen_k, plan.seqused_k) == (3, 3, None)
    leading = plan_packing(
        mask[:, :2].flip(1).sort(1, descending=True)[0], batch=2, q_len=3, k_len=2
    )
    assert leading.route == "seqused"
    assert leading.seqused_k.tolist() == [2, 1]
    assert (leading.cu_seqlens_k, leading.max_seqlen_k) == (None, 0)
    assert plan_packing(None, batch=2, q_len=3, k_len=4).lengths is DENSE


def test_names_of_kernels_are_their_providers() -> None:
    assert len({provider.name for provider in PROVIDERS}) == len(PROVIDERS)
