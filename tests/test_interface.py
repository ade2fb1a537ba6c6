"""FlashAttention-3's functions on any kernel: their arguments, their order, their results."""

from __future__ import annotations

import inspect

import pytest
import torch
from by_name import by_name
from oracle import close, oracle
from schemas import OPS

from diffusers_fa3 import flash_attn_varlen_func, flash_attn_with_kvcache
from diffusers_fa3.errors import InputError, KernelUnavailableError
from diffusers_fa3.kernels.providers import reference

UPSTREAM_VARLEN = (
    "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k softmax_scale "
    "causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits "
    "pack_gqa deterministic sm_margin return_attn_probs"
)
UPSTREAM_KVCACHE = (
    "q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad "
    "page_table cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens q_descale k_descale "
    "v_descale softmax_scale causal window_size attention_chunk softcap rotary_interleaved "
    "scheduler_metadata num_splits pack_gqa sm_margin return_softmax_lse"
)
Q_LENS, K_LENS = (2, 0, 3), (4, 2, 0)


def ends(*lens):
    return torch.tensor([sum(lens[:i]) for i in range(len(lens) + 1)], dtype=torch.int32)


@pytest.fixture
def packed():
    torch.manual_seed(0)
    q = torch.randn(5, 4, 8, dtype=torch.float64)
    k, v = torch.randn(6, 2, 8).double(), torch.randn(6, 2, 6).double()
    return [q, k, v, ends(*Q_LENS), ends(*K_LENS), 3, 4]


@pytest.fixture
def cached():
    torch.manual_seed(0)
    q = torch.randn(2, 1, 4, 8)
    k_cache, v_cache = torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    return [q, k_cache, v_cache]


@pytest.mark.parametrize(
    ("function", "names"),
    [(flash_attn_varlen_func, UPSTREAM_VARLEN), (flash_attn_with_kvcache, UPSTREAM_KVCACHE)],
    ids=["varlen", "kvcache"],
)
def test_the_arguments_are_upstreams_in_upstreams_order(function, names):
    parameters = inspect.signature(function).parameters.values()
    by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    ours = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert by_position == names.split()
    assert ours == ["kernel", "out", "return_lse"]


def test_packed_samples(packed):
    q, k, v = packed[:3]
    out = flash_attn_varlen_func(*packed)
    assert isinstance(out, torch.Tensor)
    close(out[:2], oracle(q[:2], k[:4], v[:4], 8**-0.5)[0])
    assert not out[2:].any()


@pytest.mark.parametrize("switch", ["return_lse", "return_attn_probs"])
def test_a_log_sum_exp_by_either_name(packed, switch):
    q, k, v = packed[:3]
    out, lse = flash_attn_varlen_func(*packed, **{switch: True})
    assert out.shape == (5, 4, 6)
    close(lse[:, :2], oracle(q[:2], k[:4], v[:4], 8**-0.5)[1])
    assert (lse[:, 2:] == -torch.inf).all()


def test_every_option_counts(packed):
    q, k, v = packed[:3]
    used = torch.tensor([3, 2, 0], dtype=torch.int32)
    out = flash_attn_varlen_func(
        *packed,
        seqused_k=used,
        softmax_scale=0.3,
        causal=True,
        window_size=(1, None),
        softcap=0.5,
    )
    options = {"causal": True, "window": (1, -1), "softcap": 0.5}
    close(out[:2], oracle(q[:2], k[:3], v[:3], 0.3, **options)[0])


def test_out_receives_the_result(packed):
    out = torch.full((5, 4, 6), 7.0, dtype=torch.float64)
    want = flash_attn_varlen_func(*packed)
    assert flash_attn_varlen_func(*packed, out=out) is out
    assert torch.equal(out, want)
    got, lse = flash_attn_varlen_func(*packed, out=out, return_lse=True)
    assert got is out
    assert lse.shape == (4, 5)


def test_gradients_reach_all_inputs(packed):
    for x in packed[:3]:
        x.requires_grad_()
    flash_attn_varlen_func(*packed).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in packed[:3])


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_gradients_are_zero_where_there_is_no_key(packed, kernel):
    q, k, v, ends_q, ends_k, q_max, _ = packed[:7]
    q, k, v = q.requires_grad_(), k[:0].requires_grad_(), v[:0].requires_grad_()
    out = flash_attn_varlen_func(q, k, v, ends_q, ends_k * 0, q_max, 0, kernel=kernel)
    assert not out.any()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
    assert not gradients[0].any()


def test_a_function_given_as_the_kernel_serves(packed):
    called = []

    def mine(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale):
        called.append(softmax_scale)
        return q[..., :6].clone()

    out = torch.empty(5, 4, 6, dtype=torch.float64)
    assert flash_attn_varlen_func(*packed, kernel=mine, out=out, softmax_scale=0.5) is out
    assert called == [0.5]
    assert torch.equal(out, packed[0][..., :6])


def changed(packed, **changes):
    names = UPSTREAM_VARLEN.split()[:7]
    return [changes.get(name, value) for name, value in zip(names, packed, strict=True)]


BAD = {
    "rank": ({"q": torch.zeros(1, 5, 4, 8)}, "q must have 3 axes"),
    "head size": ({"q": torch.zeros(5, 4, 4).double()}, "one head size"),
    "k and v": ({"v": torch.zeros(5, 2, 8).double()}, "one length and number of heads"),
    "heads": ({"q": torch.zeros(5, 3, 8).double()}, "multiple of k's; got 3 and 2"),
    "dtype": ({"q": torch.zeros(5, 4, 8)}, "one dtype; got torch.float32, torch.float64"),
    "device": ({"q": torch.zeros(5, 4, 8, device="meta").double()}, "one device; got meta"),
    "int64 lengths": ({"cu_seqlens_q": ends(*Q_LENS).long()}, "cu_seqlens_q must be an int32"),
    "no tensor": ({"cu_seqlens_k": [0, 4]}, r"cu_seqlens_k must be an int32 .* got \[0, 4\]"),
    "lengths on meta": ({"cu_seqlens_q": ends(*Q_LENS).to("meta")}, "must be on cpu; got meta"),
    "samples": ({"cu_seqlens_k": ends(4, 2)}, "cu_seqlens_k must have 4 entries; got 3"),
    "none": ({"cu_seqlens_q": ends()[:0]}, r"cu_seqlens_q must have B \+ 1 entries; got 0"),
    "max tensor": ({"max_seqlen_q": torch.tensor(3)}, "max_seqlen_q must be an int on the host"),
    "max none": ({"max_seqlen_k": None}, "max_seqlen_k must be an int on the host"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_arguments_that_do_not_belong_together_are_refused(packed, name):
    changes, words = BAD[name]
    with pytest.raises(InputError, match=words):
        flash_attn_varlen_func(*changed(packed, **changes))


def test_seqused_k_is_one_number_for_each_sample(packed):
    with pytest.raises(InputError, match="seqused_k must have 3 entries; got 2"):
        flash_attn_varlen_func(*packed, seqused_k=torch.ones(2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seqused_q", torch.ones(3)),
        ("qv", torch.ones(3)),
        ("attention_chunk", 4),
        ("num_splits", 0),
        ("num_splits", 2),
        ("pack_gqa", True),
        ("sm_margin", 8),
    ],
)
def test_an_argument_that_not_every_kernel_has_is_refused(packed, name, value):
    with pytest.raises(InputError, match=f"{name}: not taken here"):
        flash_attn_varlen_func(*packed, **{name: value})


def test_deterministic_is_refused_only_where_it_could_be_broken(packed):
    flash_attn_varlen_func(*packed, deterministic=True)
    packed[0].requires_grad_()
    with pytest.raises(InputError, match="deterministic: not taken here"):
        flash_attn_varlen_func(*packed, deterministic=True)


def test_an_unfit_out_is_refused(packed):
    with pytest.raises(InputError, match=r"shape \(5, 4, 6\); got \(5, 4, 8\)"):
        flash_attn_varlen_func(*packed, out=torch.empty(5, 4, 8).double())
    with pytest.raises(InputError, match="memory of an input"):
        flash_attn_varlen_func(*packed, out=packed[0].as_strided((5, 4, 6), (32, 8, 1)))


def test_a_kernel_that_is_asked_for_is_refused_rather_than_replaced(packed):
    with pytest.raises(KernelUnavailableError, match="torch_varlen"):
        flash_attn_varlen_func(*packed, kernel="torch_varlen")
    with pytest.raises(KernelUnavailableError, match="no kernel is called"):
        flash_attn_varlen_func(*packed, kernel="flash")


@pytest.mark.parametrize("lens", [3, torch.tensor([3, 3], dtype=torch.int32)], ids=["int", "each"])
def test_a_cache_with_the_same_length_for_all_or_one_for_each(cached, lens):
    q, k_cache, v_cache = cached
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lens)
    for i in range(2):
        close(out[i], oracle(q[i], k_cache[i, :3], v_cache[i, :3], 8**-0.5)[0])


def test_new_keys_are_appended_in_place(cached):
    q, k_cache, v_cache = cached
    k, v = torch.randn(2, 1, 2, 8), torch.randn(2, 1, 2, 8)
    out = torch.empty_like(q)
    got, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=2, causal=True, out=out, return_softmax_lse=True
    )
    assert got is out
    assert torch.equal(k_cache[:, 2], k[:, 0])
    assert torch.equal(v_cache[:, 2], v[:, 0])
    want, want_lse = oracle(q[1], k_cache[1, :3], v_cache[1, :3], 8**-0.5)
    close(out[1], want)
    close(lse[1], want_lse)


CACHE_BAD = {
    "k alone": ({"k": torch.zeros(2, 1, 2, 8)}, "k and v must be given together"),
    "k without lengths": (
        {"k": torch.zeros(2, 1, 2, 8), "v": torch.zeros(2, 1, 2, 8)},
        "k and v need cache_seqlens",
    ),
    "rank": ({"cu_seqlens_q": ends(1, 1)}, "q must have 3 axes"),
    "new keys' length": (
        {"k": torch.zeros(2, 1, 2, 8), "v": torch.zeros(2, 3, 2, 8), "cache_seqlens": 1},
        "k and v must be of one batch and length",
    ),
    "new keys' heads": (
        {"k": torch.zeros(2, 1, 4, 8), "v": torch.zeros(2, 1, 4, 8), "cache_seqlens": 1},
        "k must have the heads, head size, dtype and device of k_cache",
    ),
    "new values' dtype": (
        {"k": torch.zeros(2, 1, 2, 8), "v": torch.zeros(2, 1, 2, 8).half(), "cache_seqlens": 1},
        "v must have the heads, head size, dtype and device of v_cache",
    ),
    "new keys' samples": (
        {"k": torch.zeros(1, 1, 2, 8), "v": torch.zeros(1, 1, 2, 8), "cache_seqlens": 1},
        "new keys for each sample; got 1 for 2",
    ),
    "rows": ({"cache_batch_idx": ends(1)[:1]}, "cache_batch_idx must have 2 entries; got 1"),
    "rows without index": ({"q": torch.zeros(1, 1, 4, 8)}, "a row for each sample; got 2 for 1"),
    "lengths": ({"cache_seqlens": torch.tensor([1, 2])}, "cache_seqlens must be an int32"),
    "out": ({"out": torch.zeros(2, 1, 4, 4)}, r"shape \(2, 1, 4, 8\)"),
}


@pytest.mark.parametrize("name", list(CACHE_BAD))
def test_cache_arguments_that_do_not_belong_together_are_refused(cached, name):
    changes, words = CACHE_BAD[name]
    arguments = dict(zip(("q", "k_cache", "v_cache"), cached, strict=True)) | changes
    with pytest.raises(InputError, match=words):
        flash_attn_with_kvcache(**arguments)


def test_rotary_halves_that_a_build_gets_wrong_are_refused(cached):
    halves = {"rotary_cos": torch.ones(9, 4), "rotary_interleaved": False}
    with pytest.raises(InputError, match="rotary_cos of halves needs a head size"):
        flash_attn_with_kvcache(*cached, **halves)


def test_a_cache_records_no_gradient(cached):
    cached[0].requires_grad_()
    with pytest.raises(InputError, match=r"torch\.no_grad"):
        flash_attn_with_kvcache(*cached)
    with torch.no_grad():
        flash_attn_with_kvcache(*cached)


def test_out_must_not_lie_in_the_cache(cached):
    q, k_cache, v_cache = cached
    with pytest.raises(InputError, match="memory of an input"):
        flash_attn_with_kvcache(q, k_cache, v_cache, out=k_cache.view(2, 3, 4, 8)[:, :1])


@pytest.mark.parametrize("name", ["rotary_cos", "cache_leftpad", "qv", "scheduler_metadata"])
def test_what_the_kernel_lacks_is_refused(cached, name):
    with pytest.raises(KernelUnavailableError, match=f"reference cannot take {name}"):
        flash_attn_with_kvcache(*cached, **{name: torch.zeros(2)})


def test_a_kernel_without_a_cache_entry_is_refused(cached):
    def mine(q, k, v):
        return q

    with pytest.raises(KernelUnavailableError, match="mine cannot serve: built without kvcache"):
        flash_attn_with_kvcache(*cached, kernel=mine)


def test_a_function_over_a_cache_can_be_the_kernel(cached):
    def mine(q, k_cache, v_cache, cache_seqlens=None, softmax_scale=None, causal=False):
        return reference.kvcache(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, softmax_scale=softmax_scale
        )[0]

    lens = torch.tensor([2, 3], dtype=torch.int32)
    want = flash_attn_with_kvcache(*cached, cache_seqlens=lens)
    assert torch.equal(flash_attn_with_kvcache(*cached, cache_seqlens=lens, kernel=mine), want)
    q, k, v = cached
    with pytest.raises(KernelUnavailableError, match="mine cannot serve: built without varlen"):
        flash_attn_varlen_func(
            q[0], k[0], v[0], *2 * [torch.tensor([0, 1], dtype=torch.int32)], 1, 1, kernel=mine
        )


def test_a_raw_op_gets_the_cache_under_its_own_names(cached):
    q, k_cache, v_cache = (x.bfloat16() for x in cached)
    lens = torch.tensor([2, 3], dtype=torch.int32)
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lens, causal=True, kernel=OPS["upstream"].op
    )
    got = OPS["upstream"].last
    assert torch.equal(got["seqused_k"], lens)
    assert (got["is_causal"], got["num_splits"], got["softmax_scale"]) == (True, 0, 8**-0.5)
    want, _ = by_name(reference.forward)(
        q, k_cache, v_cache, softmax_scale=8**-0.5, seqused_k=lens, causal=True
    )
    close(out, want)
