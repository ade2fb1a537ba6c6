"""The reference kernel defines what is correct; it is checked against the oracle and SDPA."""

from __future__ import annotations

import pytest
import torch
from by_name import by_name
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import close, oracle
from torch.nn import functional as F

from diffusers_fa3.errors import InputError, KernelUnavailableError
from diffusers_fa3.kernels.providers.reference import LIMITS, load
from diffusers_fa3.kernels.providers.reference import forward as reference_forward
from diffusers_fa3.kernels.providers.reference_kvcache import kvcache

forward = by_name(reference_forward)
SCALE = 0.37
NAN = float("nan")


def tensors(*shape, heads=4, kv_heads=4, dim=8, dim_v=8, dtype=torch.float64, k_shape=None):
    generator = torch.Generator().manual_seed(sum(shape))
    k_shape = shape if k_shape is None else k_shape

    def make(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    return (
        make(*shape, heads, dim),
        make(*k_shape, kv_heads, dim),
        make(*k_shape, kv_heads, dim_v),
    )


def ends(lens):
    return torch.tensor([sum(lens[:i]) for i in range(len(lens) + 1)], dtype=torch.int32)


def packed_oracle(q, k, v, q_lens, k_lens, used=None, **options):
    outs, lses, q_at, k_at = [], [], 0, 0
    for i, (q_len, k_len) in enumerate(zip(q_lens, k_lens, strict=True)):
        keys = slice(k_at, k_at + (k_len if used is None else used[i]))
        out, lse = oracle(q[q_at : q_at + q_len], k[keys], v[keys], SCALE, **options)
        outs.append(out)
        lses.append(lse)
        q_at, k_at = q_at + q_len, k_at + k_len
    return torch.cat(outs), torch.cat(lses, dim=1)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "left window": {"window": (1, -1)},
    "right window": {"window": (-1, 0)},
    "causal window": {"causal": True, "window": (2, -1)},
    "softcap": {"softcap": 0.7},
    "causal softcap": {"causal": True, "softcap": 0.7},
}


@pytest.mark.parametrize("return_lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("lens", [([3, 3], [3, 3]), ([2, 4, 1], [5, 3, 0])], ids=["even", "uneven"])
def test_packed_samples_are_each_attended_alone(name, lens, return_lse):
    q_lens, k_lens = lens
    q, k, v = tensors(sum(q_lens), k_shape=(sum(k_lens),), kv_heads=2, dim_v=4)
    out, lse = forward(
        q,
        k,
        v,
        softmax_scale=SCALE,
        cu_seqlens_q=ends(q_lens),
        cu_seqlens_k=ends(k_lens),
        max_seqlen_q=max(q_lens),
        max_seqlen_k=max(k_lens),
        return_lse=return_lse,
        **OPTIONS[name],
    )
    want, want_lse = packed_oracle(q, k, v, q_lens, k_lens, **OPTIONS[name])
    close(out, want)
    if return_lse:
        assert lse.dtype == torch.float32
        close(lse, want_lse)
    else:
        assert lse is None


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("k_len", [2, 5, 7])
def test_dense_calls_align_the_last_query_with_the_last_key(name, k_len):
    q, k, v = tensors(2, 5, k_shape=(2, k_len), kv_heads=1)
    out, lse = forward(q, k, v, softmax_scale=SCALE, return_lse=True, **OPTIONS[name])
    plain, none = forward(q, k, v, softmax_scale=SCALE, **OPTIONS[name])
    assert none is None
    for i in range(2):
        want, want_lse = oracle(q[i], k[i], v[i], SCALE, **OPTIONS[name])
        close(out[i], want)
        close(plain[i], want)
        close(lse[i], want_lse)


@settings(deadline=None, max_examples=60)
@given(
    lens=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6),
    data=st.data(),
    kv_heads=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    return_lse=st.booleans(),
)
def test_any_lengths_with_any_number_of_valid_keys(lens, data, kv_heads, causal, return_lse):
    q_lens, k_lens = [list(side) for side in zip(*lens, strict=True)]
    used = [data.draw(st.integers(0, n)) for n in k_lens]
    q, k, v = tensors(sum(q_lens), k_shape=(sum(k_lens),), kv_heads=kv_heads)
    k_at = 0
    for length, valid in zip(k_lens, used, strict=True):
        k[k_at + valid : k_at + length] = NAN
        v[k_at + valid : k_at + length] = NAN
        k_at += length
    out, lse = forward(
        q,
        k,
        v,
        softmax_scale=SCALE,
        cu_seqlens_q=ends(q_lens),
        cu_seqlens_k=ends(k_lens),
        seqused_k=torch.tensor(used, dtype=torch.int32),
        causal=causal,
        return_lse=return_lse,
    )
    want, want_lse = packed_oracle(q, k, v, q_lens, k_lens, used, causal=causal)
    close(out, want)
    if return_lse:
        close(lse, want_lse)


@pytest.mark.parametrize("used", [[3, 3, 3], [5, 2, 0], [0, 0, 5]])
@pytest.mark.parametrize("fill", [NAN, float("inf")])
def test_dense_keys_behind_the_valid_ones_are_never_read(used, fill):
    q, k, v = tensors(3, 5)
    for i, valid in enumerate(used):
        k[i, valid:] = fill
        v[i, valid:] = fill
    lens = torch.tensor(used, dtype=torch.int32)
    out, lse = forward(q, k, v, softmax_scale=SCALE, seqused_k=lens, return_lse=True)
    plain, _ = forward(q, k, v, softmax_scale=SCALE, seqused_k=lens)
    for i, valid in enumerate(used):
        want, want_lse = oracle(q[i], k[i, :valid], v[i, :valid], SCALE)
        close(out[i], want)
        close(plain[i], want)
        close(lse[i], want_lse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["dense", "seqused", "packed", "by logits"])
def test_the_error_is_no_larger_than_that_of_sdpa(dtype, way):
    exact = tensors(2, 40, dim=32, dim_v=32)
    q, k, v = (x.to(dtype) for x in exact)
    # The truth is SDPA in float64 on the rounded inputs; SDPA's error at this dtype is the budget.
    truth = sdpa(*(x.double() for x in (q, k, v)))
    budget = (sdpa(q, k, v).double() - truth).abs().max()
    cu = ends([40, 40])
    options = {
        "dense": {},
        "seqused": {"seqused_k": torch.tensor([40, 40], dtype=torch.int32)},
        "packed": {"cu_seqlens_q": cu, "cu_seqlens_k": cu},
        "by logits": {"return_lse": True},
    }[way]
    if way == "packed":
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out, _ = forward(q, k, v, softmax_scale=SCALE, **options)
    assert out.dtype == dtype
    error = (out.double() - truth.view_as(out)).abs().max()
    assert error <= 2 * budget + 64 * torch.finfo(torch.float64).eps


def sdpa(q, k, v, **options):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE, **options).transpose(1, 2)


def gradients(function, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weights).sum(), inputs)


@pytest.mark.parametrize("softcap", [0.0, 1e9], ids=["", "by logits"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_sdpa_with_the_mask(causal, softcap):
    q, k, v = tensors(2, 5, kv_heads=2)
    used = torch.tensor([5, 3], dtype=torch.int32)
    seen = (torch.arange(5) < used[:, None])[:, None, None, :].expand(2, 1, 5, 5).clone()
    if causal:  # bottom-right: the last query meets the last valid key
        offset = torch.arange(5) - torch.arange(5)[:, None]
        seen &= (offset <= (used[:, None, None] - 5))[:, None]

    def ours(q, k, v):
        options = {"seqused_k": used, "causal": causal, "softcap": softcap}
        return forward(q, k, v, softmax_scale=SCALE, **options)[0]

    def theirs(q, k, v):
        return sdpa(q, k, v, attn_mask=seen, enable_gqa=True)

    for got, want in zip(gradients(ours, q, k, v), gradients(theirs, q, k, v), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("return_lse", [False, True])
def test_rows_without_keys_bring_no_nan_not_even_on_the_way_back(return_lse):
    q, k, v = (x.requires_grad_() for x in tensors(1, 5, k_shape=(1, 3)))
    with torch.autograd.set_detect_anomaly(True):
        options = {"causal": True, "softcap": 2.0, "return_lse": return_lse}
        out, lse = forward(q, k, v, softmax_scale=SCALE, **options)
        loss = out.sum() if lse is None else out.sum() + lse[..., 2:].sum()
        loss.backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_gradients_pass_a_numeric_check_on_packed_samples():
    q, k, v = (x.requires_grad_() for x in tensors(6, heads=2, kv_heads=1, dim=3, dim_v=2))
    cu_q, cu_k = ends([1, 3, 2]), ends([3, 0, 3])

    def packed(q, k, v):
        return forward(q, k, v, softmax_scale=SCALE, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)[0]

    assert torch.autograd.gradcheck(packed, (q, k, v))


@pytest.mark.parametrize("way", ["dense", "seqused", "packed"])
def test_out_receives_the_result_whatever_its_strides(way):
    q, k, v = tensors(2, 5)
    options = {"softmax_scale": SCALE}
    if way == "seqused":
        options["seqused_k"] = torch.tensor([5, 3], dtype=torch.int32)
    if way == "packed":
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        options |= {"cu_seqlens_q": ends([2, 8]), "cu_seqlens_k": ends([7, 3])}
    want, _ = forward(q, k, v, **options)
    out = torch.full((*q.shape[:-1], 16), NAN, dtype=q.dtype)[..., ::2]
    got, _ = forward(q, k, v, out=out, **options)
    assert got is out
    assert torch.equal(out, want)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_in_gives_nothing_out(shape):
    q, k, v = tensors(*shape)
    out, lse = forward(q, k, v, softmax_scale=SCALE, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (shape[0], 4, shape[1])


def test_no_sample_is_copied_where_all_are_of_one_length():
    q, k, v = tensors(4, 6)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    cu = ends([6] * 4)
    out, _ = forward(*packed, softmax_scale=SCALE, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert torch.equal(out, sdpa(q, k, v).flatten(0, 1))


def test_float8_is_refused():
    q, k, v = tensors(1, 2)
    with pytest.raises(KernelUnavailableError, match="reference cannot take k_descale"):
        forward(q, k, v, softmax_scale=SCALE, k_descale=torch.ones(1, 4))
    assert torch.float8_e4m3fn not in LIMITS.dtypes


def test_it_says_that_it_copies_into_out():
    kernel = load()
    assert (kernel.name, kernel.out, kernel.limits.backward) == ("reference", "copy", True)


class TestCache:
    """New keys are written after the valid keys, and attended with them."""

    def tensors(self, batch=3, q_len=2, capacity=7):
        q, k_cache, v_cache = tensors(batch, q_len, k_shape=(batch, capacity), kv_heads=2, dim_v=4)
        _, k, v = tensors(batch, 2, kv_heads=2, dim_v=4)
        return q, k_cache, v_cache, k, v

    @pytest.mark.parametrize("causal", [False, True])
    def test_append_and_attend(self, causal):
        q, k_cache, v_cache, k, v = self.tensors()
        before, lens = k_cache.clone(), [0, 3, 5]
        out, lse = kvcache(
            q,
            k_cache,
            v_cache,
            softmax_scale=SCALE,
            k=k,
            v=v,
            cache_seqlens=torch.tensor(lens, dtype=torch.int32),
            causal=causal,
            return_lse=True,
        )
        for i, n in enumerate(lens):
            assert torch.equal(k_cache[i, n : n + 2], k[i])
            assert torch.equal(v_cache[i, n : n + 2], v[i])
            assert torch.equal(k_cache[i, :n], before[i, :n])
            assert torch.equal(k_cache[i, n + 2 :], before[i, n + 2 :])
            keys = slice(0, n + 2)
            want, want_lse = oracle(q[i], k_cache[i, keys], v_cache[i, keys], SCALE, causal=causal)
            close(out[i], want)
            close(lse[i], want_lse)

    def test_rows_of_the_cache_may_be_in_any_order(self):
        q, k_cache, v_cache, k, v = self.tensors()
        rows = torch.tensor([2, 0], dtype=torch.int32)
        lens = torch.tensor([1, 4], dtype=torch.int32)
        out, _ = kvcache(
            q[:2],
            k_cache,
            v_cache,
            softmax_scale=SCALE,
            k=k[:2],
            v=v[:2],
            cache_seqlens=lens,
            cache_batch_idx=rows,
        )
        for i, (row, n) in enumerate([(2, 3), (0, 6)]):
            assert torch.equal(k_cache[row, n - 2 : n], k[i])
            close(out[i], oracle(q[i], k_cache[row, :n], v_cache[row, :n], SCALE)[0])

    def test_pages_are_read_and_written_in_their_order(self):
        q, k_cache, v_cache, k, v = self.tensors(batch=2, capacity=8)
        lens = torch.tensor([3, 6], dtype=torch.int32)
        whole_k, whole_v = k_cache.clone(), v_cache.clone()
        want, _ = kvcache(q, whole_k, whole_v, softmax_scale=SCALE, k=k, v=v, cache_seqlens=lens)
        order = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)  # pages of 4 keys
        pages_k, pages_v = (torch.empty(4, 4, *x.shape[2:], dtype=x.dtype) for x in (k, v))
        for i in range(2):
            for j in range(2):
                pages_k[order[i, j]] = k_cache[i, 4 * j : 4 * j + 4]
                pages_v[order[i, j]] = v_cache[i, 4 * j : 4 * j + 4]
        out, _ = kvcache(
            q,
            pages_k,
            pages_v,
            softmax_scale=SCALE,
            k=k,
            v=v,
            cache_seqlens=lens,
            page_table=order,
        )
        close(out, want)
        assert torch.equal(pages_k[3, 3], k[0, 0])
        assert torch.equal(pages_k[0, 0], k[0, 1])

    def test_a_full_cache_needs_no_lengths(self):
        q, k_cache, v_cache, _, _ = self.tensors()
        out, lse = kvcache(q, k_cache, v_cache, softmax_scale=SCALE)
        assert lse is None
        close(out[1], oracle(q[1], k_cache[1], v_cache[1], SCALE)[0])

    def test_what_does_not_fit_is_refused_before_anything_is_written(self):
        q, k_cache, v_cache, k, v = self.tensors()
        before = k_cache.clone()
        lens = torch.tensor([0, 3, 6], dtype=torch.int32)
        with pytest.raises(InputError, match="holds 7 keys; 6 and 2 new do not fit"):
            kvcache(q, k_cache, v_cache, softmax_scale=SCALE, k=k, v=v, cache_seqlens=lens)
        assert torch.equal(k_cache, before)

    @pytest.mark.parametrize("name", ["cache_leftpad", "rotary_cos", "cu_seqlens_q", "qv"])
    def test_what_it_lacks_is_refused(self, name):
        q, k_cache, v_cache, _, _ = self.tensors()
        with pytest.raises(KernelUnavailableError, match=f"reference cannot take {name}"):
            kvcache(q, k_cache, v_cache, softmax_scale=SCALE, **{name: torch.zeros(3)})

    def test_pages_and_rows_exclude_each_other(self):
        q, k_cache, v_cache, _, _ = self.tensors()
        index = torch.zeros(3, 1, dtype=torch.int32)
        with pytest.raises(InputError, match="exclude each other"):
            kvcache(
                q,
                k_cache,
                v_cache,
                softmax_scale=SCALE,
                page_table=index,
                cache_batch_idx=index[:, 0],
            )
