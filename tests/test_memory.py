"""Packing allocates the valid keys, the queries that are packed, the output, and no more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusers_fa3 import attention, flash_attn_varlen_func, plan_packing
from diffusers_fa3.masks.rows import CPU_BLOCK
from diffusers_fa3.tools.bench.methods import Method, peak_bytes

B, S, H, D = 2, 2048, 4, 64
SLACK = 100_000
"""Bytes for indices and lengths, which grow with tokens but not with heads."""


def peak(run: object) -> int:
    with torch.inference_mode():
        return peak_bytes(Method(lambda _: run()), None, "cpu")


def size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def valid_tokens() -> Tensor:
    """(B, S) bool with a gap, so that keys must be copied."""
    position = torch.arange(S)
    return (position < torch.tensor([[100], [300]])) | (position >= 512)


@pytest.mark.parametrize("pack_queries", [False, True], ids=["keys", "queries"])
def test_packing_takes_what_is_packed_and_the_output(pack_queries: bool) -> None:
    q, k, v = torch.randn(3, B, S, H, D)
    plan = plan_packing(valid_tokens(), batch=B, q_len=S, k_len=S, pack_queries=pack_queries)
    packed = plan.pack(q, k, v)
    ends = (plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k)
    bare = peak(lambda: flash_attn_varlen_func(*packed, *ends, kernel="reference"))
    ours = peak(lambda: attention(q, k, v, plan, kernel="reference"))
    copied = size(*packed[1:]) if not pack_queries else size(*packed) + size(q)
    assert ours <= bare + copied + SLACK


def test_keys_that_lead_are_not_copied() -> None:
    q, k, v = torch.randn(3, B, S, H, D)
    valid = torch.arange(S) < torch.tensor([[1500], [1000]])
    plan = plan_packing(valid, batch=B, q_len=S, k_len=S)
    assert plan.route == "seqused"
    for given, kept in zip((q, k, v), plan.pack(q, k, v)):
        assert kept.data_ptr() == given.data_ptr()


def test_out_takes_the_place_of_an_output() -> None:
    q, k, v = torch.randn(3, B, S, H, D)
    plan = plan_packing(valid_tokens(), batch=B, q_len=S, k_len=S)
    out = torch.empty_like(q)
    alone = peak(lambda: attention(q, k, v, plan, kernel="reference"))
    assert peak(lambda: attention(q, k, v, plan, kernel="reference", out=out)) <= alone


def test_a_mask_that_is_a_view_of_its_rows_is_never_laid_out() -> None:
    length = 16384
    mask = (torch.arange(length) < 10000).expand(1, 1, length, length)
    read = peak(lambda: plan_packing(mask, batch=1, q_len=length, k_len=length))
    assert read < 20 * length


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_that_is_laid_out_is_read_in_pieces(dtype: torch.dtype) -> None:
    length = 8192
    seen = torch.ones(1, 1, length, length, dtype=torch.bool).tril_()
    mask = seen
    if dtype != torch.bool:
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
    read = peak(lambda: plan_packing(mask, batch=1, q_len=length, k_len=length))
    # For an additive mask, a bool copy of the whole mask is made: one byte per value.
    assert read < 3 * CPU_BLOCK + (0 if dtype == torch.bool else seen.numel())
