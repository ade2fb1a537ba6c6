"""kernel="fastest" on a GPU: exact, whoever wins, and never far behind either of the two."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from zoo.budget import assert_within_budget
from zoo.case import key_mask

from diffusers_fa3 import attention, coverage, enable_fa3
from diffusers_fa3 import fastest as fastest_module
from diffusers_fa3.kernels.race import Races

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def races(monkeypatch: pytest.MonkeyPatch) -> Races:
    fresh = Races()
    monkeypatch.setattr(fastest_module, "races", fresh)
    return fresh


@pytest.mark.parametrize("layout", [None, "all_true", "right", "left", "ragged", "gap"])
@pytest.mark.parametrize("length", [40, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_call_is_exact_and_was_timed_once(layout, length, dtype, races) -> None:
    q, k, v = torch.randn(3, 2, length, 4, 64, device="cuda").to(dtype)
    mask = None if layout is None else key_mask(layout, length).cuda()
    seen = None if mask is None else mask[:, None, None]
    exact, default = (
        F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), attn_mask=seen)
        for qkv in ((q.double(), k.double(), v.double()), (q, k, v))
    )
    for _ in range(2):
        out = attention(q, k, v, mask, kernel="fastest")
        assert_within_budget(out, default.transpose(1, 2), exact.transpose(1, 2))
    (choice,) = {*races._choices.values()}
    assert choice.lead >= 1


def test_a_cuda_graph_uses_what_is_known_and_times_nothing(races) -> None:
    q, k, v = torch.randn(3, 1, 300, 4, 64, device="cuda").bfloat16()
    expected = attention(q, k, v, kernel="fastest")
    known = dict(races._choices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, kernel="fastest")
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    assert races._choices == known


def test_a_model_is_served_without_fallback() -> None:
    from switching import BY_NAME

    case = BY_NAME["flux"]
    model = case.build(torch.bfloat16).cuda()
    enable_fa3(model, kernel="fastest", fallback="error")
    case.run(model, "none")
    report = coverage(model)
    assert sum(sum(row.choices.values()) for row in report.rows) > 0
