"""Gradients of models through a real kernel: as close to float64 as the default attention's are."""

from __future__ import annotations

import traceback

import pytest
import torch
from gpu.installed_kernels import usable
from gradients import gradients
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import CASES, Layout
from zoo.watch import watched

from diffusers_fa3 import KernelUnavailableError, coverage, enable_fa3
from diffusers_fa3.kernels.installed import kernel_named

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BY_NAME = {case.name: case for case in CASES}

SOUND = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN, which the default is on an H100: its backward gives NaN, or anything, at 28 tokens.

Seen with torch 2.11 and cuDNN 9.19; https://github.com/pytorch/pytorch/issues/196678 has a cause.
"""


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("flux", "none"),
        ("qwenimage", "gap"),
        ("unet_sd15", "ragged"),
        ("chroma", "left"),
        ("pixart", "right"),
        ("wan_t2v", "none"),
    ],
)
@pytest.mark.parametrize("kernel", usable())
def test_gradients_in_bfloat16(kernel: str, name: str, layout: Layout, checkpointing: bool) -> None:
    case = BY_NAME[name]

    def trained(dtype: torch.dtype, device: str) -> nn.Module:
        model = case.build(dtype).train().to(device)
        if checkpointing:
            model.enable_gradient_checkpointing()
        return model

    model = trained(torch.bfloat16, "cuda")
    enable_fa3(model, kernel=kernel, fallback="error")
    if not kernel_named(kernel).limits.backward:
        with pytest.raises(KernelUnavailableError, match="built without backward") as refused:
            gradients(case, layout, model)
        # Before torch 2.13, checkpoint's hooks stay on after an error until these are gone.
        traceback.clear_frames(refused.tb)
        return
    with watched() as log, sdpa_kernel(SOUND):
        default = gradients(case, layout, trained(torch.bfloat16, "cuda"))
    exact = gradients(case, layout, trained(torch.float64, "cpu"))
    # Of all weights together: the worst of them differs from run to run, on the default as well.
    error, allowed = (
        (g.cpu().double() - exact).norm() for g in (gradients(case, layout, model), default)
    )
    assert error <= 1.5 * allowed, f"{error / allowed:.2f} times the default's error"
    assert coverage(model).calls == len(log.calls)  # those of the second forward included
