"""Each argument in its slot, for the schema of every real FlashAttention-3 binary."""

from __future__ import annotations

import pytest
import schemas
import torch
from by_name import by_name
from schemas import OPS

from diffusers_fa3.errors import KernelUnavailableError
from diffusers_fa3.kernels.adapt import without_padding
from diffusers_fa3.kernels.raw_op import RawOp, differentiable, find_op

SCALE = 0.3
every_op = pytest.mark.parametrize("name", list(OPS))


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(*shape, dtype=dtype) for _ in range(3)]


def ends(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@every_op
def test_each_argument_of_a_packed_call_lands_in_its_slot(name):
    q, k, v = tensors(7, 2, 8)
    cu_q, cu_k, used = ends(0, 3, 7), ends(0, 2, 7), ends(1, 4)
    recording = OPS[name]

    out, lse = by_name(RawOp(recording.op, name).forward)(
        q,
        k,
        v,
        softmax_scale=SCALE,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        seqused_k=used,
        max_seqlen_q=4,
        max_seqlen_k=5,
        causal=True,
        window=(3, 0),
        softcap=2.0,
        return_lse=True,
    )

    got = recording.last
    asked = {
        "q": q,
        "k": k,
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "seqused_k": used,
    }
    for argument, value in asked.items():
        assert got[argument].data_ptr() == value.data_ptr(), argument
    plain = {
        "softmax_scale": SCALE,
        "is_causal": True,
        "window_size_left": 3,
        "window_size_right": 0,
        "softcap": 2.0,
        "max_seqlen_q": 4,
        "max_seqlen_k": 5,
        "num_splits": 1,
    }
    assert {argument: got[argument] for argument in plain} == plain
    assert torch.equal(got["v"][[0, 2, 3, 4, 5]], v[[0, 2, 3, 4, 5]])
    assert not got["v"][[1, 6]].any()  # right after the 1 and 4 valid keys
    rest = (
        got.keys()
        - asked.keys()
        - plain.keys()
        - {"v"}
        - {"is_rotary_interleaved", "cp_world_size"}
    )
    assert not any(got[argument] for argument in rest)
    assert out.shape == q.shape
    assert lse.shape == (2, 7)


@every_op
def test_values_behind_valid_keys_never_reach_the_op(name):
    q, k, v = tensors(2, 5, 2, 8)
    v[0, 3:], v[1, 1:] = torch.nan, torch.inf
    by_name(RawOp(OPS[name].op, name).forward)(q, k, v, softmax_scale=SCALE, seqused_k=ends(3, 1))
    got = OPS[name].last["v"]
    assert torch.equal(got[0, :3], v[0, :3])
    assert torch.equal(got[1, :1], v[1, :1])
    assert not got[0, 3:].any()
    assert not got[1, 1:].any()
    assert v.isnan().any()  # the caller's v is unchanged


@every_op
def test_a_dense_call_asks_for_nothing_else(name):
    q, k, v = tensors(2, 5, 2, 8)
    out, lse = by_name(RawOp(OPS[name].op, name).forward)(q, k, v, softmax_scale=1)
    got = OPS[name].last
    assert (got["max_seqlen_q"], got["max_seqlen_k"]) == (None, None)
    assert got["softmax_scale"] == 1.0
    assert isinstance(got["softmax_scale"], float)
    assert (got["cu_seqlens_q"], got["out"], got["is_causal"]) == (None, None, False)
    assert out.shape == q.shape
    assert lse is None


@every_op
def test_out_reaches_the_op_and_comes_back(name):
    q, k, v = tensors(2, 5, 2, 8)
    want, _ = by_name(RawOp(OPS[name].op, name).forward)(q, k, v, softmax_scale=SCALE)
    out = torch.empty_like(q)
    result, _ = by_name(RawOp(OPS[name].op, name).forward)(q, k, v, softmax_scale=SCALE, out=out)
    assert OPS[name].last["out"].data_ptr() == out.data_ptr()
    assert result is out
    assert torch.equal(out, want)


def test_an_out_that_tma_cannot_store_into_is_served_by_a_copy():
    q, k, v = tensors(2, 5, 2, 8)
    raw = by_name(RawOp(OPS["upstream"].op, "upstream").forward)
    want, _ = raw(q, k, v, softmax_scale=SCALE)
    out = torch.empty(q.numel() + 1)[1:].view_as(q)
    result, _ = raw(q, k, v, softmax_scale=SCALE, out=out)
    assert OPS["upstream"].last["out"] is None
    assert result is out
    assert torch.equal(out, want)


def test_inputs_reach_the_op_with_a_dense_last_axis():
    q, k, v = (x.transpose(-1, -2) for x in tensors(2, 5, 8, 2))
    by_name(RawOp(OPS["upstream"].op, "upstream").forward)(q, k, v, softmax_scale=SCALE)
    got = OPS["upstream"].last
    assert [got[name].stride(-1) for name in "qkv"] == [1, 1, 1]


@pytest.mark.parametrize("keys", [(0, 2, 8), (2, 0, 2, 8)], ids=["packed", "dense"])
def test_a_call_without_any_key_never_reaches_the_op(keys):
    q = torch.randn(*(6, 2, 8) if len(keys) == 3 else (2, 3, 2, 8))
    k = torch.randn(*keys)
    calls = len(OPS["upstream"].calls)
    out, lse = by_name(RawOp(OPS["upstream"].op, "upstream").forward)(
        q, k, k, softmax_scale=SCALE, out=torch.ones_like(q), return_lse=True
    )
    assert len(OPS["upstream"].calls) == calls
    assert not out.any()
    assert lse.shape == ((2, 6) if len(keys) == 3 else (2, 2, 3))
    assert lse.dtype == torch.float32
    assert (lse == -torch.inf).all()


@every_op
def test_the_arguments_of_a_cache_call_land_under_the_ops_names(name):
    q, k_cache, v_cache = tensors(2, 4, 2, 8)
    new = torch.randn(2, 1, 2, 8)
    lens, rows = ends(1, 2), ends(1, 0)
    RawOp(OPS[name].op, name).kvcache(
        q,
        k_cache,
        v_cache,
        softmax_scale=SCALE,
        k=new,
        v=new,
        cache_seqlens=lens,
        cache_batch_idx=rows,
        rotary_seqlens=lens,
        rotary_interleaved=False,
        causal=True,
        window_size=(5, 0),
    )
    got = OPS[name].last
    assert torch.equal(got["seqused_k"], lens)
    assert torch.equal(got["seqlens_rotary"], lens)
    assert torch.equal(got["kv_batch_idx"], rows)
    assert torch.equal(got["k_new"], new)
    assert torch.equal(got["v_new"], new)
    assert (got["is_rotary_interleaved"], got["is_causal"], got["num_splits"]) == (False, True, 0)
    assert (got["window_size_left"], got["window_size_right"]) == (5, 0)


def test_an_argument_that_the_op_lacks_is_refused_and_not_dropped():
    q, k, v = tensors(2, 5, 2, 8)
    with pytest.raises(KernelUnavailableError, match="vllm cannot take attention_chunk"):
        RawOp(OPS["vllm"].op, "vllm").kvcache(q, k, v, softmax_scale=SCALE, attention_chunk=4)


def test_a_newer_op_is_taken_where_its_new_argument_has_a_default():
    schema = schemas.UPSTREAM.replace("sm_margin=0)", "sm_margin=0, int novelty=7)")
    recording = schemas.register("newer", schema)
    by_name(RawOp(recording.op, "newer").forward)(*tensors(2, 5, 2, 8), softmax_scale=SCALE)
    assert recording.last["novelty"] == 7


def test_a_newer_op_is_refused_where_its_new_argument_must_be_known():
    schema = schemas.VLLM.replace("int cp_rank", "int novelty, int cp_rank")
    with pytest.raises(KernelUnavailableError, match="unknown arguments: novelty"):
        RawOp(schemas.register("too_new", schema).op, "too_new")


def test_a_package_that_registers_no_op_is_refused():
    assert find_op("fa3_test_nothing_here") is None
    with pytest.raises(KernelUnavailableError, match="nothing: its package registered no op"):
        RawOp(find_op("fa3_test_nothing_here"), "nothing")


def test_another_op_is_refused():
    with pytest.raises(KernelUnavailableError, match="aten::add is none that this version knows"):
        RawOp(torch.ops.aten.add.Tensor, "add")


def test_gradients_go_through_the_builds_own_functions():
    q, k, v = tensors(2, 5, 2, 8)
    taken = []

    def forward(kind):
        def call(q, k, v, *records, **options):
            taken.append(kind)
            return q, None

        return call

    kernel = by_name(differentiable(forward("raw"), forward("public")))
    kernel(q, k, v, softmax_scale=SCALE)
    kernel(q, k.requires_grad_(), v, softmax_scale=SCALE)
    with torch.no_grad():
        kernel(q, k, v, softmax_scale=SCALE)
    assert taken == ["raw", "public", "raw"]


def test_float8_values_are_zeroed_as_well():
    v = torch.ones(2, 5, 2, 8).to(torch.float8_e4m3fn)
    zeroed = without_padding(v, ends(3, 0), None)
    assert zeroed.dtype == v.dtype
    assert zeroed.float()[:, :, 0, 0].tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("is_safe", [False, True])
@every_op
def test_values_go_to_the_op_as_they_are_where_padding_is_safe(name, is_safe):
    q, k, v = tensors(2, 5, 2, 8)
    recording = OPS[name]
    by_name(RawOp(recording.op, name).forward)(
        q, k, v, softmax_scale=SCALE, seqused_k=ends(5, 3), padding_is_safe=is_safe
    )
    assert (recording.last["v"].data_ptr() == v.data_ptr()) == is_safe
