"""The models of the zoo on a real kernel: as close to float64 as the default attention is."""

from __future__ import annotations

import pytest
import torch
from gpu.installed_kernels import usable
from zoo import RUN_IDS, RUNS, Case, Layout
from zoo.budget import assert_within_budget
from zoo.watch import watched

from diffusers_fa3 import coverage, enable_fa3
from diffusers_fa3.providers import kernel_named

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


CPU_CACHES = ("sana_wm_refiner_kv_cache", "wan_animate2_generation")
"""Cases whose key-value caches are objects that stay where they were made."""


@pytest.mark.parametrize("kernel", usable())
@pytest.mark.parametrize(("case", "layout"), RUNS, ids=RUN_IDS)
def test_a_model_in_bfloat16(case: Case, layout: Layout, kernel: str) -> None:
    if case.name in CPU_CACHES:
        pytest.skip("its caches are made on the CPU")
    if (case.name, kernel) == ("ace_step", "fa3_fwd"):
        pytest.skip("fa3_fwd is built without a sliding window")
    model = case.build(torch.bfloat16).to("cuda")
    with watched() as log:
        default = case.run(model, layout)
    most = kernel_named(kernel).limits.max_head_dim
    if any(call.q[-1] % 8 or call.q[-1] > most for call in log.calls):
        pytest.skip("a head size that the kernel does not have")
    exact = case.exact(layout)

    left = case.refusal or case.unreached
    enable_fa3(model, kernel=kernel, fallback="silent" if left else "error")
    output = case.run(model, layout)
    assert_within_budget(output.cpu(), default.cpu(), exact)
    report = coverage(model)
    if not left:
        assert report.fallbacks == 0
        assert report.calls == len(log.calls) - case.outside
