"""Under torch.autocast, q, k and v are cast as by PyTorch's attention, and stay on a kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from zoo import CASES
from zoo.budget import assert_within_budget

from diffusers_fa3 import InputError, attention, coverage, enable_fa3, plan_packing

BY_NAME = {case.name: case for case in CASES}
QK_NORMS = ["sd3", "qwenimage", "hunyuan_video", "flux", "unet_sd15"]
HERE = [name for name in QK_NORMS if name in BY_NAME]
DTYPES = [torch.bfloat16, torch.float16]
MASK = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 1, 1]], dtype=torch.bool)


def qkv(*dtypes: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 2, 8, generator=generator).to(dtype) for dtype in dtypes]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


MIXED = {
    "float32": (torch.float32,) * 3,
    "norms in float32": (torch.float32, torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16,) * 3,
    "float16": (torch.float16,) * 3,
    "float64": (torch.float64,) * 3,
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", MIXED)
def test_inputs_are_cast_as_pytorchs_attention_casts_them(
    given: str, dtype: torch.dtype, masked: bool
) -> None:
    q, k, v = qkv(*MIXED[given])
    mask = MASK if masked else None
    with torch.autocast("cpu", dtype):
        expected = sdpa(q, k, v, mask)
        got = attention(q, k, v, mask, kernel="reference")
        out = torch.empty_like(expected)
        assert attention(q, k, v, mask, kernel="reference", out=out) is out
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)
    assert torch.equal(out, got)


def test_an_out_of_the_dtype_that_was_given_is_refused_under_autocast() -> None:
    q, k, v = qkv(*MIXED["float32"])
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InputError, match=r"out must have dtype torch\.bfloat16"),
    ):
        attention(q, k, v, kernel="reference", out=torch.empty_like(q))


def test_mixed_dtypes_are_an_error_where_autocast_is_not() -> None:
    q, k, v = qkv(*MIXED["norms in float32"])
    for off in (torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)):
        with off, pytest.raises(InputError, match="of one dtype"):
            attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False), pytest.raises(InputError, match="of one dtype"):
            attention(q, k, v)
        with pytest.raises(InputError, match="of one dtype"):
            attention(q.double(), k, v)
        attention(q, k, v)


def test_autocast_of_another_device_changes_nothing() -> None:
    q, k, v = qkv(*MIXED["float32"])
    with torch.autocast("xpu", torch.bfloat16):
        assert attention(q, k, v).dtype == torch.float32
    meta = [x.to("meta") for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*meta, kernel="reference").dtype == torch.float32


def test_a_plan_serves_under_autocast_too() -> None:
    q, k, v = qkv(*MIXED["norms in float32"])
    plan = plan_packing(MASK, batch=2, q_len=5, k_len=5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attention(q, k, v, plan), sdpa(q, k, v, MASK))


@pytest.mark.parametrize("given", ["float32", "norms in float32"])
def test_gradients_are_of_the_dtypes_that_were_given(given: str) -> None:
    grads = []
    for run in (sdpa, lambda q, k, v, m: attention(q, k, v, m, kernel="reference")):
        inputs = [x.requires_grad_() for x in qkv(*MIXED[given])]
        with torch.autocast("cpu", torch.bfloat16):
            result = run(*inputs, MASK)
        result.float().square().sum().backward()
        grads.append([x.grad for x in inputs])
        assert [x.grad.dtype for x in inputs] == [x.dtype for x in inputs]
    for theirs, ours in zip(*grads):
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", HERE)
def test_a_model_under_autocast_stays_on_the_kernel(name: str) -> None:
    case = BY_NAME[name]
    layout = case.layouts[-1]
    with torch.autocast("cpu", torch.bfloat16):
        default = case.run(case.build(), layout)
        model = case.build()
        enable_fa3(model, kernel="reference", fallback="error")
        output = case.run(model, layout)
    assert output.dtype == default.dtype
    assert coverage(model).calls
    assert_within_budget(output, default, case.exact(layout))


def compiled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(run, backend="aot_eager", fullgraph=True)


def test_a_compiled_call_is_cast_as_an_eager_one() -> None:
    q, k, v = qkv(*MIXED["norms in float32"])

    @compiled
    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attention(q, k, v, MASK, kernel="reference")

    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            expected = attention(q, k, v, MASK, kernel="reference")
            around = compiled(lambda *x: attention(*x, MASK, kernel="reference"))(q, k, v)
        torch.testing.assert_close(around, expected)
        torch.testing.assert_close(inside(q, k, v), expected)


def test_a_compiled_model_under_autocast_is_on_the_kernel() -> None:
    case = BY_NAME["sd3"]
    model = case.build()
    enable_fa3(model, kernel="reference", fallback="error")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = case.run(model, "none")
        calls = coverage(model).calls
        torch._dynamo.reset()
        model.compile(backend="aot_eager")
        torch.testing.assert_close(case.run(model, "none"), expected, atol=0.02, rtol=0.02)
    assert coverage(model).calls == 2 * calls
