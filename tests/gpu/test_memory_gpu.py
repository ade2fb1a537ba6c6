"""What reading a mask takes on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from diffusers_fa3 import plan_packing
from diffusers_fa3.masks.rows import GPU_BLOCK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("length", [24 * 1024, 24 * 1024 + 1], ids=["whole words", "odd"])
@pytest.mark.parametrize("pattern", ["padding", "causal", "blocks"])
def test_a_mask_that_is_laid_out_is_read_in_pieces(pattern: str, length: int) -> None:
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda")
    if pattern == "causal":
        mask.tril_()
    elif pattern == "padding":
        mask[..., 1000:2000] = False
    else:
        mask[..., : length // 2, length // 2 :] = False
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    plan = plan_packing(mask, batch=1, q_len=length, k_len=length)
    assert plan.route == ("band" if pattern == "causal" else "packed")
    assert torch.cuda.max_memory_allocated() - before < 4 * GPU_BLOCK
