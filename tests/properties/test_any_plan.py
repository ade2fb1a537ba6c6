"""Any plan is the mask: built again from what a kernel is told, each pair of a query and a key that
it sees is there once, and no other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from diffusers_fa3 import MaskError
from diffusers_fa3.masks.packing import PackingPlan

from . import tried
from .calls import Call, Planned, some_calls, some_planned_calls
from .tensors import DISJOINT, LAYOUTS, Sizes


def numbered(batch: int, length: int) -> Tensor:
    """(B, S, 1, 1), each token with its own number."""
    return torch.arange(float(batch * length)).view(batch, length, 1, 1)


def sequences(plan: PackingPlan, sizes: Sizes) -> Iterator[tuple[Tensor, Tensor]]:
    """The numbers of the queries and keys that a kernel is to put together."""
    q, k, v = plan.pack(
        numbered(sizes.batch, sizes.q_len),
        numbered(sizes.batch, sizes.k_len),
        numbered(sizes.batch, sizes.k_len),
    )
    assert torch.equal(k, v)
    if plan.route == "packed":
        q_ends, k_ends = plan.cu_seqlens_q, plan.cu_seqlens_k
        for ends, tokens, longest in (
            (q_ends, q, plan.max_seqlen_q),
            (k_ends, k, plan.max_seqlen_k),
        ):
            assert ends.dtype == torch.int32
            assert ends[0] == 0
            assert ends[-1] == len(tokens)
            assert ends.diff().max() == longest
        q_parts, k_parts = (
            x.flatten().tensor_split(ends[1:-1].tolist()) for x, ends in ((q, q_ends), (k, k_ends))
        )
        yield from zip(q_parts, k_parts, strict=True)
        return
    used = [k.shape[1]] * sizes.batch
    if plan.seqused_k is not None:
        assert plan.seqused_k.dtype == torch.int32
        used = plan.seqused_k.tolist()
    for sample_q, sample_k, n in zip(q.flatten(1), k.flatten(1), used, strict=True):
        yield sample_q, sample_k[:n]


def pairs(plan: PackingPlan, sizes: Sizes) -> Tensor:
    """How often each query is put together with each key, (B, Sq, Sk)."""
    batch, _, q_len, k_len = sizes
    times = torch.zeros(batch * q_len, batch * k_len, dtype=torch.int64)
    left, right = plan.window
    right = 0 if plan.causal else right
    for queries, keys in sequences(plan, sizes):
        offset = torch.arange(len(keys)) - torch.arange(
            len(keys) - len(queries), len(keys)
        ).unsqueeze(-1)
        seen = torch.ones_like(offset, dtype=torch.bool)
        seen &= (offset <= right) if right >= 0 else seen
        seen &= (offset >= -left) if left >= 0 else seen
        times[queries.long()[:, None], keys.long()] += seen
    return _within_samples(times, sizes)


def _within_samples(times: Tensor, sizes: Sizes) -> Tensor:
    batch, _, q_len, k_len = sizes
    blocks = times.view(batch, q_len, batch, k_len).transpose(1, 2)
    same = torch.eye(batch, dtype=torch.bool)
    assert not blocks[~same].any(), "a query is put together with a key of another sample"
    return blocks[same]


@tried(4)
@given(planned=some_planned_calls())
def test_each_pair_that_is_seen_is_there_once(planned: Planned) -> None:
    sizes, times = planned.call.sizes, 0
    for launch in planned.launches:
        times = times + pairs(launch, sizes)
    assert torch.equal(times, planned.seen.long())


@tried(2)
@given(planned=some_planned_calls())
def test_no_key_is_packed_that_no_query_of_its_sequence_sees(planned: Planned) -> None:
    assume(planned.way != "static")
    sizes = planned.call.sizes
    for launch in planned.launches:
        for queries, keys in sequences(launch, sizes):
            q, k = queries.long() % sizes.q_len, keys.long() % max(sizes.k_len, 1)
            for sample in (queries[:1].long() // sizes.q_len).tolist():
                assert planned.seen[sample][q][:, k].any(0).all()


@tried(2)
@given(planned=some_planned_calls(), layout=st.sampled_from(DISJOINT))
def test_unpacking_undoes_packing(planned: Planned, layout: str) -> None:
    q, k, _ = planned.call.qkv.tensors
    batch, heads, q_len, _ = planned.call.sizes
    times = torch.zeros(batch * q_len, dtype=torch.int64)
    total, total_lse = torch.zeros_like(q), torch.full((batch, heads, q_len), -torch.inf)
    for launch in planned.launches:
        for queries, _ in sequences(launch, planned.call.sizes):
            times[queries.long()] += 1
        packed, _, _ = launch.pack(q, k, k)
        unpacked = launch.unpack(packed)
        total += unpacked

        memory = torch.full(LAYOUTS[layout].memory(*q.shape), torch.nan, dtype=q.dtype)
        out = LAYOUTS[layout].view(memory, *q.shape)
        buffer = launch.buffer(out)
        result = packed if buffer is None else buffer.copy_(packed)
        launch.unpack(result, out)
        assert torch.equal(out, unpacked)

        lse = packed[..., 0].float().transpose(-1, -2)
        total_lse = torch.maximum(total_lse, launch.unpack_lse(lse))
    kept = times.view(batch, q_len) == 1
    assert (times <= 1).all()
    assert kept[planned.seen.any(-1)].all()
    assert torch.equal(total, q * kept[:, :, None, None])
    lse = q[..., 0].float().transpose(1, 2)
    assert torch.equal(total_lse, lse.masked_fill(~kept[:, None], -torch.inf))


@tried(1)
@given(call=some_calls())
def test_a_static_plan_is_made_where_a_sample_has_one_row_and_no_value_is_asked(
    call: Call,
) -> None:
    assume(call.mask is not None)
    assert call.mask is not None
    mask = call.mask.four_axes
    one_row = all(mask.shape[axis] <= 1 or mask.stride(axis) == 0 for axis in (1, 2))
    try:
        plan = call.plan(static=True)
    except MaskError:
        assert mask.is_floating_point() or not one_row
    else:
        assert plan.route == "static"
        assert one_row
