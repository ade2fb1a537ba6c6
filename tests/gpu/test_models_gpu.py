"""The models of the zoo on a real kernel: as close to float64 as the default attention is."""

from __future__ import annotations

import pytest
import torch
from zoo import RUN_IDS, RUNS, Case, Layout
from zoo.budget import assert_within_budget
from zoo.watch import watched

from diffusers_fa3 import available_kernels, coverage, enable_fa3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def usable() -> list[str]:
    if not torch.cuda.is_available():
        return ["none"]
    return [
        row.name for row in available_kernels("cuda") if row.accepted and row.name != "reference"
    ]


@pytest.mark.parametrize("kernel", usable())
@pytest.mark.parametrize(("case", "layout"), RUNS, ids=RUN_IDS)
def test_a_model_in_bfloat16(case: Case, layout: Layout, kernel: str) -> None:
    model = case.build(torch.bfloat16).to("cuda")
    with watched() as log:
        default = case.run(model, layout)
    exact = case.exact(layout)

    enable_fa3(model, kernel=kernel, fallback="silent" if case.refusal else "error")
    output = case.run(model, layout)
    assert_within_budget(output.cpu(), default.cpu(), exact)
    report = coverage(model)
    assert report.calls + report.fallbacks == len(log.calls)
    assert bool(report.fallbacks) == bool(case.refusal and log.hides)
