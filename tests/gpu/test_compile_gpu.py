"""Whole models on a real kernel, compiled by inductor into one graph."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from zoo import CASES
from zoo.budget import assert_within_budget

from diffusers_fa3 import attention, coverage, enable_fa3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # torch's compiler, of rotary embeddings, and of a part of a model that has no kernels
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(
    ("name", "layout", "route"),
    [("flux", "none", "dense"), ("qwenimage", "gap", "static"), ("sd3", "none", "dense")],
)
def test_a_compiled_model(name: str, layout: str, route: str, mode: str) -> None:
    torch._dynamo.reset()
    case = BY_NAME[name]
    plain = torch.compile(case.build(torch.bfloat16).to("cuda"), fullgraph=True)
    model = case.build(torch.bfloat16).to("cuda")
    enable_fa3(model, fallback="error")
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        output = case.run(compiled, layout)
        default = case.run(plain, layout)
        assert_within_budget(output.cpu(), default.cpu(), case.exact(layout))
    assert {r for row in coverage(model).rows for r in row.calls} == {route}


def test_a_mask_of_thousands_of_keys() -> None:
    """inductor counts along so many keys in a kernel of its own, beside which it has no sums."""
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 2, 4608, 2, 64, device="cuda").bfloat16()
    keys = torch.arange(4608, device="cuda")
    lens = torch.tensor([[512], [3]], device="cuda")
    mask = (keys < lens) | (keys >= 4000)
    out = torch.compile(attention, fullgraph=True)(q, k, v, mask)
    default, exact = (
        scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), mask[:, None, None])
        for qkv in ((q, k, v), (q.double(), k.double(), v.double()))
    )
    assert_within_budget(out.transpose(1, 2), default, exact)
