"""Masks that depend on the query: read as bands or groups, packed, and equal to the default."""

from __future__ import annotations

import pytest
import torch
from patterns import PATTERNS, B, rebuilt
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3 import KernelUnavailableError, MaskError, attention, plan_packing
from diffusers_fa3.masks import rows
from diffusers_fa3.masks.meaning import Opaque, Sequences
from diffusers_fa3.masks.plan_cache import _alike
from diffusers_fa3.masks.read import read_mask

H, D = 2, 8

every_pattern = pytest.mark.parametrize("name", PATTERNS)


def sizes_of(mask: Tensor) -> tuple[int, int, int, int]:
    return B, H, mask.shape[-2], mask.shape[-1]


def tensors(mask: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(B, length, H, D, generator=generator, dtype=dtype)
        for length in (mask.shape[-2], mask.shape[-1], mask.shape[-1])
    )


def plan_of(mask: Tensor):
    batch, heads, q_len, k_len = sizes_of(mask)
    return plan_packing(mask, batch=batch, heads=heads, q_len=q_len, k_len=k_len, axes_2d="qk")


def read(mask: Tensor):
    batch, heads, q_len, k_len = sizes_of(mask)
    return read_mask(mask, batch=batch, heads=heads, q_len=q_len, k_len=k_len, axes_2d="qk")


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@every_pattern
@pytest.mark.parametrize("block", [1, 64, 2**26])
def test_a_pattern_is_read_as_what_it_is(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "CPU_BLOCK", block)
    make, means = PATTERNS[name]
    mask = make()
    meaning = read(mask)
    if isinstance(means, int):
        assert isinstance(meaning, Sequences)
        assert len(meaning.sequences) == means
    else:
        assert meaning == means
    assert torch.equal(rebuilt(meaning, sizes_of(mask)), mask.expand(sizes_of(mask)))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name in PATTERNS
        for form in ("bool", "-inf", "-1e4", "per head")
        # The default averages over a row of -1e4 only, so it must serve; see test_masks.
        if (name, form) != ("strictly causal", "-1e4")
    ],
)
def test_attention_is_that_of_the_default(name: str, form: str) -> None:
    mask = PATTERNS[name][0]()
    given = mask
    if form == "per head":
        given = mask.expand(sizes_of(mask)).contiguous()
    elif form != "bool":
        given = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float(form))
    q, k, v = tensors(mask)
    plan = plan_of(given)
    result = attention(q, k, v, plan)
    torch.testing.assert_close(result, sdpa(q, k, v, mask))
    out = torch.full_like(result, torch.nan)
    assert attention(q, k, v, plan, out=out) is out
    assert torch.equal(out, result)


@every_pattern
def test_the_log_sum_exp_is_of_the_keys_seen(name: str) -> None:
    mask = PATTERNS[name][0]()
    q, k, v = tensors(mask)
    _, lse = attention(q, k, v, plan_of(mask), return_lse=True)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * D**-0.5
    torch.testing.assert_close(
        lse, logits.masked_fill(~mask, -torch.inf).logsumexp(-1).float(), atol=1e-6, rtol=1e-6
    )


@every_pattern
def test_gradients_are_those_of_the_default(name: str) -> None:
    mask = PATTERNS[name][0]()
    leaves = [x.requires_grad_() for x in tensors(mask)]
    weight = torch.randn(B, mask.shape[-2], H, D, dtype=torch.float64)
    ours = torch.autograd.grad((attention(*leaves, plan_of(mask)) * weight).sum(), leaves)
    seen = mask.any(-1).view(-1, 1, mask.shape[-2], 1)  # SDPA's gradient of an empty row is NaN
    logits = torch.einsum("bqhd,bkhd->bhqk", *leaves[:2]) * D**-0.5
    weights = logits.masked_fill(~mask & seen, -torch.inf).softmax(-1) * seen
    want = torch.einsum("bhqk,bkhd->bqhd", weights, leaves[2])
    for got, expected in zip(ours, torch.autograd.grad((want * weight).sum(), leaves)):
        torch.testing.assert_close(got, expected)


def test_keys_that_no_query_sees_are_never_read() -> None:
    mask = PATTERNS["padded causal"][0]()
    q, k, v = tensors(mask)
    clean = attention(q, k, v, plan_of(mask))
    for x in (k, v):
        x[0, 17:] = torch.nan
    assert torch.equal(attention(q, k, v, plan_of(mask)), clean)


def test_no_tensor_is_copied_where_groups_are_neighbours() -> None:
    plan = plan_of(PATTERNS["segments"][0]())
    assert plan.indices_q is None
    assert plan.indices_k is None
    q, k, v = tensors(PATTERNS["segments"][0]())
    packed = plan.pack(q, k, v)
    assert [x.data_ptr() for x in packed] == [x.data_ptr() for x in (q, k, v)]


def test_a_band_but_for_one_row_is_none() -> None:
    mask = PATTERNS["sliding window"][0]()
    mask[9] = mask[9].roll(1)  # as many keys as before: counts alone look like a band
    assert isinstance(read(mask), Opaque)


def scatter() -> Tensor:
    return torch.rand(B, 1, 24, 24, generator=torch.Generator().manual_seed(0)) < 0.5


def test_scatter_is_left_to_the_default() -> None:
    meaning = read(scatter())
    assert meaning == Opaque("mask that depends on the query: packing would copy too many keys")
    with pytest.raises(MaskError, match="depends on the query"):
        attention(*tensors(scatter()), scatter(), kernel="reference")


def test_too_many_groups_are_left_to_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_GROUPS", 2)
    assert read(PATTERNS["segments"][0]()) == Opaque(
        "mask that depends on the query, in 3 groups of rows"
    )


def test_keys_may_be_copied_often_where_many_queries_share_them() -> None:
    frames = torch.arange(4096) // 512  # eight blocks: each key is copied 4.5 times on average
    meaning = read((frames[:, None] >= frames)[None, None])
    assert isinstance(meaning, Sequences)
    frames = torch.arange(64) // 8
    assert isinstance(read((frames[:, None] >= frames)[None, None]), Opaque)


def test_a_window_needs_a_kernel_that_has_one() -> None:
    def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None):
        raise AssertionError("not to be called")

    mask = PATTERNS["sliding window"][0]()
    with pytest.raises(KernelUnavailableError, match="built without window"):
        attention(*tensors(mask, torch.bfloat16), plan_of(mask), kernel=kernel)


def test_rows_guessed_to_be_causal_join_those_that_see_alike() -> None:
    three, four = torch.arange(24) < 3, (torch.arange(24) >= 10) & (torch.arange(24) < 14)
    mask = torch.stack([three, four] * 32)  # counts rise by one in each pair, but by other keys
    meaning = read(mask[None, None])
    assert isinstance(meaning, Sequences)
    assert [len(s.queries) for s in meaning.sequences] == [32, 32]


def test_the_limit_of_groups_holds_for_rows_that_were_taken_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask = torch.zeros(3, 6, dtype=torch.bool)
    for row, keys in enumerate(([0], [1, 2], [3, 4, 5])):  # counts rise by one, as in a causal run
        mask[row, keys] = True
    monkeypatch.setattr(rows, "MOST_GROUPS", 2)
    assert read(mask[None, None]) == Opaque("mask that depends on the query, in 3 groups of rows")


def zeros(width: int) -> Tensor:
    return torch.zeros(2, 1, 64, width, dtype=torch.bool)


VIEWS = {
    "from the second key on": lambda: zeros(72)[..., 1:65],
    "every second key": lambda: zeros(128)[..., ::2],
    "rows at odd steps": lambda: zeros(65)[..., :64],
    "transposed": lambda: zeros(64).mT,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("pattern", ["causal", "blocks"])
def test_a_mask_may_lie_anyhow_in_memory(pattern: str, view: str) -> None:
    """Keys are counted and compared eight at a time, which not every view allows."""
    place = torch.arange(64)
    seen = place[:, None] >= place if pattern == "causal" else (place // 16)[:, None] >= place // 16
    mask = VIEWS[view]()
    mask.copy_(seen)
    sizes = {"batch": 2, "q_len": 64, "k_len": 64}
    assert _alike(plan_packing(mask, **sizes), plan_packing(mask.contiguous(), **sizes))
