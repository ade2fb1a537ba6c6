"""Masks that depend on the query, on every kernel that this machine has: for a CUDA device."""

from __future__ import annotations

import pytest
import torch
from gpu.installed_kernels import usable
from patterns import PATTERNS, B, segments
from torch import Tensor
from torch.nn import functional as F
from zoo.budget import assert_within_budget

from diffusers_fa3 import KernelUnavailableError, MaskError, attention, plan_packing
from diffusers_fa3.kernels.installed import kernel_named

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

H = 4


def text_and_image() -> Tensor:
    """A causal text of other length in each sample, then an image that sees it and itself."""
    mask = torch.ones(900, 900, dtype=torch.bool).tril().repeat(B, 1, 1, 1)
    mask[0, :, 300:] = mask[1, :, 170:] = True
    return mask


SQUARE = torch.ones(700, 700, dtype=torch.bool)
LARGE = {
    "causal": SQUARE.tril(),
    "causal suffix": SQUARE[:200].tril(500),
    "sliding window": SQUARE.tril(30) & SQUARE.triu(-90),
    "padded causal": torch.stack([SQUARE.tril() & (torch.arange(700) < 333), SQUARE.tril()])[
        :, None
    ],
    "segments": segments(torch.arange(700) // 150),
    "blocks of frames": (torch.arange(700) // 200)[:, None] >= torch.arange(700) // 200,
    "text and image": text_and_image(),
}
"""Patterns of more than one tile of a kernel."""
MASKS = {name: make() for name, (make, _) in PATTERNS.items()} | {
    f"large {name}": mask for name, mask in LARGE.items()
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("kernel", usable())
def test_a_pattern_is_as_exact_as_the_default(kernel: str, pattern: str, head_dim: int) -> None:
    mask = MASKS[pattern].cuda()
    q_len, k_len = mask.shape[-2:]
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(B, length, H, head_dim, generator=generator, device="cuda").bfloat16()
        for length in (q_len, k_len, k_len)
    )
    plan = plan_packing(mask, batch=B, q_len=q_len, k_len=k_len, heads=H, axes_2d="qk")
    if plan.window != (-1, -1) and not kernel_named(kernel).limits.window:
        with pytest.raises(KernelUnavailableError, match="built without window"):
            attention(q, k, v, plan, kernel=kernel)
        return
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    default = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
    exact = F.scaled_dot_product_attention(*(x.double() for x in heads_first), attn_mask=mask)
    output, lse = attention(q, k, v, plan, kernel=kernel, return_lse=True)
    assert_within_budget(output, default, exact.transpose(1, 2))

    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * head_dim**-0.5
    expected = logits.masked_fill(~mask, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, atol=1e-3, rtol=1e-3)

    out = torch.full_like(output, torch.nan)
    assert attention(q, k, v, plan, kernel=kernel, out=out) is out
    torch.testing.assert_close(out, output, atol=1e-2, rtol=1e-2)


def test_scatter_is_refused() -> None:
    mask = torch.rand(1, 1, 512, 512, device="cuda") < 0.5
    with pytest.raises(MaskError, match="depends on the query"):
        plan_packing(mask, batch=1, q_len=512, k_len=512)
