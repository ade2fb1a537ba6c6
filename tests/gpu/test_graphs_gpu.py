"""A CUDA graph is captured once and replayed with other masks and inputs: each result is right."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from zoo import CASES
from zoo.budget import assert_within_budget
from zoo.case import BATCH, cast, key_mask

from diffusers_fa3 import attention, coverage, enable_fa3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LAYOUTS = ("all_true", "right", "left", "ragged", "gap")


def capture(run):
    """Warm up as PyTorch asks, then capture; returns the graph and its output."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph, output


def test_attention_with_another_mask_in_every_replay() -> None:
    length = 300
    q, k, v = torch.randn(3, BATCH, length, 4, 64, device="cuda").bfloat16()
    mask = torch.ones(BATCH, length, dtype=torch.bool, device="cuda")
    graph, output = capture(lambda: attention(q, k, v, mask))
    for layout in LAYOUTS:
        mask.copy_(key_mask(layout, length))
        for x in (q, k, v):
            x.normal_()
        k[~mask] = torch.nan
        v[~mask] = torch.nan
        graph.replay()
        clean = [x.transpose(1, 2).nan_to_num() for x in (q, k, v)]
        seen = mask[:, None, None]
        default = F.scaled_dot_product_attention(*clean, attn_mask=seen)
        exact = F.scaled_dot_product_attention(*(x.double() for x in clean), attn_mask=seen)
        assert_within_budget(output, default.transpose(1, 2), exact.transpose(1, 2))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("prx", "krea2")], ids=lambda case: case.name
)
def test_a_model_with_another_mask_in_every_replay(case) -> None:
    model = case.build(torch.bfloat16).to("cuda")
    enable_fa3(model, fallback="error")
    inputs = cast(case.inputs("gap", 0.0), torch.bfloat16, "cuda")
    with torch.no_grad():
        graph, output = capture(lambda: case.pick(model(**inputs, return_dict=False)))
    assert "static" in {route for row in coverage(model).rows for route in row.calls}
    plain = case.build(torch.bfloat16).to("cuda")
    for layout in LAYOUTS:
        now = cast(case.inputs(layout, 0.0), torch.bfloat16, "cuda")
        for name, value in now.items():
            if isinstance(value, torch.Tensor):
                inputs[name].copy_(value)
        graph.replay()
        assert_within_budget(output.cpu(), case.run(plain, layout).cpu(), case.exact(layout))
