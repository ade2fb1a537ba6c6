"""The models of the zoo on a real kernel: as close to float64 as the default attention is."""

from __future__ import annotations

import pytest
import torch
from gpu.installed_kernels import usable
from zoo import RUN_IDS, RUNS, Case, Layout
from zoo.budget import assert_within_budget
from zoo.watch import watched

from diffusers_fa3 import KernelUnavailableError, coverage, enable_fa3
from diffusers_fa3.kernels.installed import kernel_named

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


CPU_CACHES = ("sana_wm_refiner_kv_cache", "wan_animate2_generation")
"""Cases whose key-value caches are objects that stay where they were made."""


@pytest.mark.parametrize("kernel", usable())
@pytest.mark.parametrize(("case", "layout"), RUNS, ids=RUN_IDS)
def test_a_model_in_bfloat16(case: Case, layout: Layout, kernel: str) -> None:
    if case.name in CPU_CACHES:  # inputs are moved where they are tensors; the CPU's suite has both
        pytest.skip("its caches are made on the CPU")
    model = case.build(torch.bfloat16).to("cuda")
    with watched() as log:
        default = case.run(model, layout)
    limits = kernel_named(kernel).limits
    # Calls outside of processors, those of poolings over heads of 2, never come to the kernel.
    other_heads = [
        call
        for call in log.calls
        if call.q[-1] % limits.head_dim_multiple or call.q[-1] > limits.max_head_dim
    ]
    windows = case.name == "ace_step"
    served = len(other_heads) <= case.outside and (limits.window or not windows)
    if not served:
        enable_fa3(model, kernel=kernel, fallback="error")
        with pytest.raises(KernelUnavailableError, match=r"serves head sizes|without window"):
            case.run(model, layout)
        return
    exact = case.exact(layout)

    left = case.refusal or case.unreached
    enable_fa3(model, kernel=kernel, fallback="silent" if left else "error")
    output = case.run(model, layout)
    assert_within_budget(output.cpu(), default.cpu(), exact)
    report = coverage(model)
    if not left:
        assert report.fallbacks == 0
        assert report.calls == len(log.calls) - case.outside
