"""Whole models on a real kernel, compiled by inductor into one graph."""

from __future__ import annotations

import pytest
import torch
from zoo import CASES
from zoo.budget import assert_within_budget

from diffusers_fa3 import coverage, enable_fa3

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
