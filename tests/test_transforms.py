"""Traces, forward-mode derivatives, torch.func and tensors without content: right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from schemas import OPS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vjp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import CASES

from diffusers_fa3 import (
    FallbackWarning,
    KernelUnavailableError,
    MaskError,
    attention,
    coverage,
    enable_fa3,
    plan_packing,
)
from diffusers_fa3.inputs import READS_IN_TRANSFORMS
from diffusers_fa3.kernels import PROVIDERS
from diffusers_fa3.kernels.contract import Limits, Machine, Request, rejection_reasons

pytestmark = [
    # torch says these of what it does itself in traces, forward-mode derivatives and vmap
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

BY_NAME = {case.name: case for case in CASES}
MASK = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)


MASKS = [None, MASK] if READS_IN_TRANSFORMS else [None]


def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 2, 8, generator=generator) for _ in range(3)]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


def on_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return attention(q, k, v, mask, kernel="reference")


def layer() -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=8, heads=2, dim_head=4, processor=AttnProcessor2_0()).eval()


# --- torch.jit.trace ---------------------------------------------------------------------------


class Whole(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x, attention_mask=mask)


def test_a_trace_records_the_default_attention_and_serves_other_masks() -> None:
    model, default = Whole(layer()), Whole(layer())
    enable_fa3(model, kernel="reference")
    x, mask = torch.randn(2, 6, 8), torch.zeros(2, 1, 6)
    with torch.no_grad(), pytest.warns(FallbackWarning, match=r"torch\.jit\.trace"):
        traced = torch.jit.trace(model, (x, mask), check_trace=False)
    assert coverage(model).fallbacks == 1
    mask[:, :, 3:] = -1e4
    torch.testing.assert_close(traced(x, mask), default(x, mask))
    torch.testing.assert_close(model(x, mask), default(x, mask))
    assert coverage(model).calls == 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [2, 1], ids=["heads alike", "grouped heads"])
def test_a_trace_of_a_call_is_that_of_pytorchs(masked: bool, heads: int) -> None:
    q, k, v = qkv()
    k, v = k[:, :, :heads], v[:, :, :heads]
    mask = MASK if masked else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention(q, k, v, mask)

    with pytest.warns(FallbackWarning, match=r"torch\.jit\.trace"):
        traced = torch.jit.trace(run, (q, k, v), check_trace=False)
    torch.testing.assert_close(traced(q + 1, k, v), run(q + 1, k, v))


# --- tensors without content -------------------------------------------------------------------


def test_a_mask_without_content_leaves_the_call_to_pytorch() -> None:
    with FakeTensorMode():
        q, k, v = torch.randn(3, 2, 5, 2, 8)
        mask = torch.ones(2, 5, dtype=torch.bool)
        with pytest.warns(FallbackWarning, match="FakeTensor"):
            assert attention(q, k, v, mask).shape == q.shape
        with pytest.raises(MaskError, match="FakeTensor"):
            attention(q, k, v, mask, kernel="reference")
        assert attention(q, k, v).shape == q.shape


def test_a_layer_with_a_mask_without_content_is_counted() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = layer()
        enable_fa3(model, kernel="reference", fallback="silent")
        x, mask = torch.randn(2, 6, 8), torch.zeros(2, 1, 6)
        assert model(x, attention_mask=mask).shape == x.shape
    (reason,) = coverage(model).rows[0].fallbacks
    assert "FakeTensor" in reason


# --- derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS, ids=["unmasked", "masked"][: len(MASKS)])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("no_grad", [False, True])
def test_forward_derivatives_go_through_the_reference(
    mask: Tensor | None, which: int, no_grad: bool
) -> None:
    inputs, tangent = qkv(), torch.randn(2, 5, 2, 8)

    def of(run: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: run(*(x if i == which else y for i, y in enumerate(inputs)), mask)

    with torch.set_grad_enabled(not no_grad), sdpa_kernel(SDPBackend.MATH):
        expected = jvp(of(sdpa), (inputs[which],), (tangent,))
        torch.testing.assert_close(jvp(of(on_reference), (inputs[which],), (tangent,)), expected)
        torch.testing.assert_close(jvp(of(attention), (inputs[which],), (tangent,)), expected)
        with forward_ad.dual_level():
            dual = of(on_reference)(forward_ad.make_dual(inputs[which], tangent))
            torch.testing.assert_close(tuple(forward_ad.unpack_dual(dual)), expected)


def test_a_kernel_that_drops_forward_derivatives_is_refused_not_used() -> None:
    q, k, v = qkv()
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    raw = OPS["upstream"].op

    def function(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        return sdpa(q, k, v).detach()

    for kernel, words in ((raw, "forward-mode"), (function, "without forward derivative")):
        attention(q, k, v, kernel=kernel)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            with pytest.raises(KernelUnavailableError, match=words):
                jvp(lambda x, kernel=kernel: attention(x, k, v, kernel=kernel), (q,), (q,))
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(q, q)
                with pytest.raises(KernelUnavailableError, match=words):
                    attention(dual, k, v, kernel=kernel)
                attention(q, k, v, kernel=kernel)  # no input is dual
    attention(q, k, v, kernel=function)


def test_only_kernels_that_are_plain_pytorch_serve_forward_derivatives() -> None:
    machine = Machine("cuda", (9, 0))
    asked = Request(torch.bfloat16, 64, 64, functional=True)
    reasons = rejection_reasons(Limits(("sm90a",)), machine, asked)
    assert reasons == ["has no forward-mode derivative, nor is it known to torch.func"]
    (reference,) = (p.load() for p in PROVIDERS if p.name == "reference")
    assert rejection_reasons(reference.limits, Machine("cpu", None), asked) == []


@pytest.mark.parametrize("mask", MASKS, ids=["unmasked", "masked"][: len(MASKS)])
def test_transforms_of_torch_func_go_through_the_reference(mask: Tensor | None) -> None:
    q, k, v = qkv()

    def loss(run: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: run(x, k, v, mask).square().sum()

    def of(run: Callable[..., Tensor]) -> dict[str, Any]:
        small = loss(lambda x, *rest: run(x, *rest))
        out, pull = vjp(lambda x: run(x, k, v, mask), q)
        return {
            "grad": grad(small)(q),
            "vjp": (out, *pull(out)),
            "vmap": vmap(lambda x: run(x, k, v, mask))(torch.stack([q, q + 1, q - 1])),
            "vmap of grad": vmap(grad(small))(torch.stack([q, q + 1])),
            "jacfwd": jacfwd(small)(q),
            "hessian": hessian(small)(q),
            "grad of jvp": grad(lambda x: jvp(small, (x,), (torch.ones_like(x),))[1])(q),
        }

    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(of(on_reference), of(sdpa), atol=1e-4, rtol=1e-4)


def test_a_mask_that_vmap_maps_leaves_the_call_to_pytorch() -> None:
    q, k, v = qkv()
    masks = torch.stack([MASK, MASK.flip(0), MASK.flip(1)])
    expected = torch.stack([sdpa(q, k, v, mask) for mask in masks])
    with pytest.warns(FallbackWarning, match=r"torch\.func"):
        got = vmap(lambda mask: attention(q, k, v, mask))(masks)
    torch.testing.assert_close(got, expected)
    plan = plan_packing(MASK, batch=2, q_len=5, k_len=5)
    queries = torch.stack([q, q + 1])
    mapped = vmap(lambda q: attention(q, k, v, plan, kernel="reference"))(queries)
    torch.testing.assert_close(mapped, torch.stack([sdpa(x, k, v, MASK) for x in queries]))


@pytest.mark.parametrize("name", [n for n in ("flux", "unet_sd15", "qwenimage") if n in BY_NAME])
def test_the_tangent_of_a_model_is_that_of_the_default(name: str) -> None:
    """As training of consistency models takes it."""
    case = BY_NAME[name]
    switched, default = case.build(), case.build()
    enable_fa3(switched, kernel="reference", fallback="error")
    inputs = case.inputs(case.layouts[-1] if READS_IN_TRANSFORMS else "none", 0.0)
    key = "hidden_states" if "hidden_states" in inputs else "sample"
    rest = {n: x for n, x in inputs.items() if n not in (key, "return_dict")}
    x = inputs[key]

    def of(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: model(**{key: x}, **rest, return_dict=False)[0]

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        expected = jvp(of(default), (x,), (torch.ones_like(x),))
        got = jvp(of(switched), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
    assert coverage(switched).calls
