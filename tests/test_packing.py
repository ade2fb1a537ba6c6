"""A plan packs the valid rows and no others, and puts every row of the output where it belongs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_fa3 import MaskError, plan_packing
from diffusers_fa3.masks.packing import PackingPlan

B, SQ, SK, H, D = 3, 4, 6, 2, 8
SIZES = {"batch": B, "q_len": SQ, "k_len": SK}


def rows(length: int) -> torch.Tensor:
    """(B, S, H, D), each row filled with its own number, b * S + s."""
    return torch.arange(B * length, dtype=torch.float32).view(B, length, 1, 1).expand(-1, -1, H, D)


def plan_of(keys: list[list[int]], **options: bool) -> PackingPlan:
    return plan_packing(torch.tensor(keys, dtype=torch.bool), **SIZES, **options)


def test_no_mask_needs_no_packing() -> None:
    plan = plan_packing(None, **SIZES)
    assert plan.route == "dense"
    q, k, v = rows(SQ), rows(SK), rows(SK)
    assert plan.pack(q, k, v) == (q, k, v)
    assert plan.unpack(q) is q


def test_an_all_true_mask_needs_no_packing() -> None:
    assert plan_of([[1] * SK] * B).route == "dense"


def test_valid_keys_in_front_are_counted_not_copied() -> None:
    plan = plan_of([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    assert plan.route == "seqused"
    assert plan.seqused_k is not None
    assert plan.seqused_k.dtype == torch.int32
    assert plan.seqused_k.tolist() == [2, 6, 0]
    k = rows(SK)
    _, kept, values = plan.pack(rows(SQ), k, k)
    assert kept is values is k


def test_keys_end_with_the_longest_sample() -> None:
    plan = plan_of([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    k = rows(SK)
    _, kept, _ = plan.pack(rows(SQ), k, k)
    assert kept.equal(k[:, :3])
    assert kept.data_ptr() == k.data_ptr()


@pytest.mark.parametrize("heads_first", [False, True])
def test_values_of_padding_are_not_given_to_a_kernel_that_reads_them(heads_first: bool) -> None:
    plan = plan_of([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    v = rows(SK)
    if heads_first:
        v = v.transpose(1, 2).contiguous().transpose(1, 2)
    _, _, values = plan.pack(rows(SQ), v, v, reads_padding=True)
    sample = torch.tensor([0, 1, 1])  # the last sample has no valid key
    taken = torch.tensor([[0, 1, 0], [0, 1, 2], [0, 0, 0]])
    assert values.equal(v[sample[:, None], taken])


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("valid", [[1, 1, 0], [0, 1, 1]], ids=["seqused", "packed"])
def test_float8_is_indexed_as_bytes(valid: list[int], heads_first: bool) -> None:
    plan = plan_of([[1] * SK, [*valid] * 2, [1] * SK])
    v = torch.randn(B, SK, H, D).to(torch.float8_e4m3fn)
    if heads_first:
        v = v.transpose(1, 2).contiguous().transpose(1, 2)

    class Bytes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "index" in func.__name__:
                assert args[0].dtype == torch.uint8
            return func(*args, **(kwargs or {}))

    with Bytes():
        _, _, values = plan.pack(v, v, v, reads_padding=True)
    wide = v.float()
    assert values.dtype == v.dtype
    assert values.float().equal(plan.pack(wide, wide, wide, reads_padding=True)[2])


def test_samples_of_one_length_need_no_count() -> None:
    plan = plan_of([[1, 1, 0, 0, 0, 0]] * B)
    assert (plan.route, plan.end_key) == ("seqused", 2)
    assert plan.seqused_k is plan.rows_v is None
    k = rows(SK)
    assert plan.pack(rows(SQ), k, k, reads_padding=True)[2].data_ptr() == k.data_ptr()


def test_of_samples_without_any_key_the_kernel_is_told() -> None:
    plan = plan_of([[0, 0, 0, 0, 0, 0]] * B)
    assert (plan.route, plan.end_key) == ("seqused", 1)
    assert plan.seqused_k.tolist() == [0, 0, 0]


def test_a_kernel_without_seqused_gets_packed_keys() -> None:
    plan = plan_of([[1, 1, 0, 0, 0, 0]] * B, seqused=False)
    assert plan.route == "packed"


def test_valid_keys_are_gathered_wherever_they_are() -> None:
    plan = plan_of([[1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    assert plan.route == "packed"
    assert plan.cu_seqlens_q is not None
    assert plan.cu_seqlens_k is not None
    assert plan.cu_seqlens_q.dtype == plan.cu_seqlens_k.dtype == torch.int32
    assert plan.cu_seqlens_q.tolist() == [0, 4, 8, 12]
    assert plan.cu_seqlens_k.tolist() == [0, 3, 7, 7]
    assert (plan.max_seqlen_q, plan.max_seqlen_k) == (4, 4)
    q, k, _ = plan.pack(rows(SQ), rows(SK), rows(SK))
    assert k[:, 0, 0].tolist() == [0, 4, 5, 8, 9, 10, 11]
    assert q[:, 0, 0].tolist() == list(range(B * SQ))


def test_queries_are_gathered_where_whole_rows_are_masked() -> None:
    queries = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    keys = torch.tensor([[1, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    mask = queries[:, None, :, None] & keys[:, None, None, :]
    plan = plan_packing(mask, **SIZES)
    assert plan.cu_seqlens_q is not None
    assert plan.cu_seqlens_q.tolist() == [0, 2, 5, 5]
    q, k, _ = plan.pack(rows(SQ), rows(SK), rows(SK))
    assert q[:, 0, 0].tolist() == [0, 1, 5, 6, 7]
    assert k[:, 0, 0].tolist() == [0, 2, 6, 7, 8]

    result = plan.unpack(q)
    assert result.shape == (B, SQ, H, D)
    assert torch.equal(result, rows(SQ) * queries[:, :, None, None])
    lse = plan.unpack_lse(q[..., 0].mT)
    assert torch.equal(
        lse, rows(SQ)[..., 0].mT.masked_fill(~queries[:, None].expand(-1, H, -1), -torch.inf)
    )


LAYOUTS_OF_OUT = {
    "contiguous": lambda: torch.full((B, SQ, H, D), 7.0),
    "heads first": lambda: torch.full((B, H, SQ, D), 7.0).transpose(1, 2),
    "a slice": lambda: torch.full((B, SQ + 2, H, D), 7.0)[:, 1:-1],
}


@pytest.mark.parametrize("make_out", LAYOUTS_OF_OUT.values(), ids=LAYOUTS_OF_OUT)
@pytest.mark.parametrize("masks_queries", [False, True])
def test_unpack_leaves_the_result_in_out(make_out, masks_queries: bool) -> None:
    keys = torch.tensor([[1, 0, 1, 0, 0, 0]] * B, dtype=torch.bool)[:, None, None, :]
    queries = torch.tensor([[1, 1, 0, 1]] * B, dtype=torch.bool)[:, None, :, None]
    plan = plan_packing(queries & keys if masks_queries else keys, **SIZES)
    packed_q, _, _ = plan.pack(rows(SQ), rows(SK), rows(SK))
    expected = plan.unpack(packed_q)

    out = make_out()
    buffer = plan.buffer(out)
    result = packed_q if buffer is None else buffer.copy_(packed_q)
    assert plan.unpack(result, out) is out
    assert torch.equal(out, expected)


@settings(deadline=None, max_examples=200)
@given(
    keys=st.lists(st.lists(st.booleans(), min_size=SK, max_size=SK), min_size=B, max_size=B),
    queries=st.lists(st.lists(st.booleans(), min_size=SQ, max_size=SQ), min_size=B, max_size=B),
    heads_first=st.booleans(),
)
def test_unpack_undoes_pack(
    keys: list[list[bool]], queries: list[list[bool]], heads_first: bool
) -> None:
    seen_q, seen_k = torch.tensor(queries), torch.tensor(keys)
    mask = seen_q[:, None, :, None] & seen_k[:, None, None, :]
    plan = plan_packing(mask, **SIZES, seqused=False)
    q, k = torch.randn(B, SQ, H, D), torch.randn(B, SK, H, D)
    if heads_first:
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    packed_q, packed_k, _ = plan.pack(q, k, k)
    if plan.route == "dense":
        assert mask.all()
        return
    assert torch.equal(packed_k, k[mask.any((1, 2))])
    kept = mask.any((1, 3))
    if plan.indices_q is None:
        assert torch.equal(plan.unpack(packed_q), q)
    else:
        assert torch.equal(packed_q, q[kept])
        assert torch.equal(plan.unpack(packed_q), q * kept[:, :, None, None])


def test_a_mask_that_packing_cannot_express_is_refused_with_the_way_out() -> None:
    bias = torch.rand(1, 1, 4, 4)
    with pytest.raises(MaskError, match=r"a bias, not a mask; .*scaled_dot_product_attention"):
        plan_packing(bias, batch=1, q_len=4, k_len=4)


# --- static: nothing is read -------------------------------------------------------------------


def test_static_moves_valid_keys_to_the_front_and_counts_them() -> None:
    plan = plan_of(
        [[1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], seqused=False, static=True
    )
    assert plan.route == "static"
    assert plan.seqused_k is not None
    assert plan.seqused_k.dtype == torch.int32
    assert plan.seqused_k.tolist() == [3, 4, 0]
    q, k, _ = plan.pack(rows(SQ), rows(SK), rows(SK))
    assert torch.equal(q, rows(SQ))
    assert k[..., 0, 0].tolist() == [
        [0, 4, 5, 0, 0, 0],
        [8, 9, 10, 11, 8, 8],
        [8, 8, 8, 8, 8, 8],  # no valid key of its own
    ]


def test_static_reads_nothing_and_its_shapes_do_not_depend_on_the_mask() -> None:
    with FakeTensorMode():
        mask = torch.ones(B, SK, dtype=torch.bool)
        plan = plan_packing(mask, **SIZES, static=True)
        packed = plan.pack(*(torch.empty(B, length, H, D) for length in (SQ, SK, SK)))
        assert [tuple(x.shape) for x in packed] == [(B, length, H, D) for length in (SQ, SK, SK)]
        with pytest.raises(DataDependentOutputException):
            plan_packing(mask, **SIZES)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(B, 1, 1, SK), "additive mask, of which only its values"),
        (torch.ones(B, 1, SQ, SK, dtype=torch.bool), "whether queries or heads differ"),
        (torch.ones(B, 2, 1, SK, dtype=torch.bool), "whether queries or heads differ"),
    ],
    ids=["additive", "per query", "per head"],
)
def test_static_refuses_what_it_would_have_to_read(mask: torch.Tensor, words: str) -> None:
    with pytest.raises(MaskError, match=words):
        plan_packing(mask, **SIZES, heads=2, static=True)


def test_static_takes_a_mask_that_was_expanded() -> None:
    mask = (torch.arange(SK) > 2).expand(B, 1, SQ, SK)
    plan = plan_packing(mask, **SIZES, static=True)
    assert plan.seqused_k is not None
    assert plan.seqused_k.tolist() == [3, 3, 3]
