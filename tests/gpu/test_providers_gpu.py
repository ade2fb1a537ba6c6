"""Every kernel that this machine has, against the reference: for a CUDA device."""

from __future__ import annotations

import pytest
import torch
from by_name import by_name
from gpu.installed_kernels import machine, usable

from diffusers_fa3 import attention
from diffusers_fa3.kernels import Request, available_kernels
from diffusers_fa3.kernels.contract import rejection_reasons
from diffusers_fa3.kernels.installed import kernel_named
from diffusers_fa3.kernels.providers import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NAMES = [*usable(), "reference"]
SCALE = 0.11
DTYPE = torch.bfloat16
Q_LENS, K_LENS = (130, 0, 257, 64), (300, 17, 0, 64)

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (40, 25)},
    "causal window": {"causal": True, "window": (40, -1)},
    "softcap": {"softcap": 3.0},
}


def ends(lens):
    return torch.tensor(
        [sum(lens[:i]) for i in range(len(lens) + 1)], dtype=torch.int32, device="cuda"
    )


def tensors(q_shape, k_shape, head_dim, kv_heads=2, heads=4):
    generator = torch.Generator("cuda").manual_seed(0)

    def make(*sizes):
        return torch.randn(*sizes, generator=generator, device="cuda").to(DTYPE)

    return (
        make(*q_shape, heads, head_dim),
        make(*k_shape, kv_heads, head_dim),
        make(*k_shape, kv_heads, head_dim),
    )


def kernel_for(name, options, *, head_dim, dtype=DTYPE, **asked):
    request = Request(
        dtype,
        head_dim,
        head_dim,
        window=options.get("window", (-1, -1)) != (-1, -1),
        softcap=options.get("softcap", 0.0) != 0,
        lse=True,
        **asked,
    )
    kernel = kernel_named(name)
    reasons = rejection_reasons(kernel.limits, machine(), request)
    if reasons:  # that what a build lacks is refused is tested in tests/test_providers.py
        pytest.skip("; ".join(reasons))
    return kernel


def agrees(kernel, q, k, v, **options):
    """Result and log-sum-exp, without and with `out`, within twice the reference's own rounding."""
    truth, truth_lse = by_name(reference.forward)(
        *(x.double() for x in (q, k, v)), softmax_scale=SCALE, return_lse=True, **options
    )
    rounded, _ = by_name(reference.forward)(
        q, k, v, softmax_scale=SCALE, return_lse=True, **options
    )
    budget = 3 * (rounded.double() - truth).abs().max() + 1e-3
    lengths = {}
    if "cu_seqlens_q" in options:
        lengths = {"max_seqlen_q": max(Q_LENS), "max_seqlen_k": max(K_LENS)}
    strided = torch.full((*q.shape[:-2], 2 * q.shape[-2], q.shape[-1]), torch.nan, device="cuda")
    strided = strided.to(q.dtype)[..., ::2, :]
    for out in (None, torch.full_like(q, torch.nan), strided):
        got, lse = by_name(kernel.forward)(
            q, k, v, softmax_scale=SCALE, out=out, return_lse=True, **lengths, **options
        )
        assert out is None or got is out
        assert (got.double() - truth).abs().max() <= budget
        torch.testing.assert_close(lse.float(), truth_lse.float(), atol=2e-3, rtol=2e-3)


def test_what_is_installed_can_be_loaded():
    broken = [row for row in available_kernels("cuda") if "fails to load" in str(row)]
    assert broken == []


@pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
@pytest.mark.parametrize("option", list(OPTIONS))
@pytest.mark.parametrize("name", NAMES)
def test_packed_samples(name, option, head_dim):
    options = OPTIONS[option]
    kernel = kernel_for(name, options, head_dim=head_dim)
    q, k, v = tensors((sum(Q_LENS),), (sum(K_LENS),), head_dim)
    agrees(kernel, q, k, v, cu_seqlens_q=ends(Q_LENS), cu_seqlens_k=ends(K_LENS), **options)


@pytest.mark.parametrize("option", list(OPTIONS))
@pytest.mark.parametrize("name", NAMES)
def test_dense_samples(name, option):
    options = OPTIONS[option]
    kernel = kernel_for(name, options, head_dim=128, varlen=False)
    q, k, v = tensors((3, 130), (3, 200), 128)
    agrees(kernel, q, k, v, **options)


@pytest.mark.parametrize("option", list(OPTIONS))
@pytest.mark.parametrize("name", NAMES)
def test_padded_samples_with_their_number_of_keys(name, option):
    options = OPTIONS[option]
    kernel = kernel_for(name, options, head_dim=128, seqused_k=True)
    q, k, v = tensors((3, 130), (3, 200), 128)
    used = torch.tensor([200, 0, 77], dtype=torch.int32, device="cuda")
    k[2, 77:] = torch.nan
    v[2, 77:] = torch.nan
    agrees(kernel, q, k, v, seqused_k=used, **options)


@pytest.mark.parametrize("length", [200, 130])
@pytest.mark.parametrize("name", NAMES)
def test_padding_that_is_not_a_number(name, length):
    q, k, v = tensors((4, 130), (4, 200), 128)
    used = torch.tensor([length, 0, 77, 1], device="cuda")
    mask = torch.arange(200, device="cuda") < used[:, None]
    clean = attention(q, k, v, mask, kernel=name)
    k[~mask] = v[~mask] = torch.nan
    assert torch.equal(attention(q, k, v, mask, kernel=name), clean)
    want = attention(q.double(), k.double(), v.double(), mask, kernel="reference")
    assert (clean.double() - want).abs().max() < 0.02
    assert not clean[1].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_call_without_any_key(name):
    kernel = kernel_for(name, {}, head_dim=64)
    q, k, v = tensors((130,), (0,), 64)
    out, lse = by_name(kernel.forward)(
        q,
        k,
        v,
        softmax_scale=SCALE,
        cu_seqlens_q=ends([130]),
        cu_seqlens_k=ends([0]),
        max_seqlen_q=130,
        max_seqlen_k=0,
        return_lse=True,
    )
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("name", NAMES)
def test_one_query_with_grouped_heads_fills_out(name):
    kernel = kernel_for(name, {}, head_dim=64)
    q, k, v = tensors((2,), (30,), 64)
    cu_q, cu_k = ends([1, 1]), ends([10, 20])
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 1, "max_seqlen_k": 20}
    out = torch.full_like(q, torch.nan)
    got, _ = by_name(kernel.forward)(q, k, v, softmax_scale=SCALE, out=out, **lengths)
    want, _ = by_name(reference.forward)(
        *(x.double() for x in (q, k, v)), softmax_scale=SCALE, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k
    )
    assert got is out
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    kernel = kernel_for(name, {}, head_dim=64, backward=True)
    q, k, v = (x.requires_grad_() for x in tensors((sum(Q_LENS),), (sum(K_LENS),), 64))
    cu = {"cu_seqlens_q": ends(Q_LENS), "cu_seqlens_k": ends(K_LENS)}
    out, _ = by_name(kernel.forward)(
        q, k, v, softmax_scale=SCALE, max_seqlen_q=max(Q_LENS), max_seqlen_k=max(K_LENS), **cu
    )
    weights = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), weights)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want_out, _ = by_name(reference.forward)(*wide, softmax_scale=SCALE, **cu)
    want = torch.autograd.grad(want_out, wide, weights.double())
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("name", NAMES)
def test_float16(name):
    kernel = kernel_for(name, {}, head_dim=64, dtype=torch.float16)
    q, k, v = (x.half() for x in tensors((sum(Q_LENS),), (sum(K_LENS),), 64))
    agrees(kernel, q, k, v, cu_seqlens_q=ends(Q_LENS), cu_seqlens_k=ends(K_LENS))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_float8_with_descales(name, packed):
    """Weights are rounded to float8 inside the kernel: 3 bits of mantissa."""
    kernel = kernel_for(name, {}, head_dim=128, varlen=packed, dtype=torch.float8_e4m3fn)
    shapes = ((sum(Q_LENS),), (sum(K_LENS),)) if packed else ((4, 130), (4, 200))
    q, k, v = (x.to(torch.float8_e4m3fn) for x in tensors(*shapes, 128))
    descale = torch.rand(3, 4, 2, device="cuda") + 0.5  # of q, k, v; (B, Hk)
    lengths, asked = {}, {}
    if packed:
        lengths = {"cu_seqlens_q": ends(Q_LENS), "cu_seqlens_k": ends(K_LENS)}
        asked = {"max_seqlen_q": max(Q_LENS), "max_seqlen_k": max(K_LENS)}

    def wide(x, factors, heads, lens):
        per_row = factors.repeat_interleave(heads // 2, dim=1)
        if packed:
            per_row = per_row.repeat_interleave(torch.tensor(lens, device="cuda"), dim=0)
            return x.double() * per_row[..., None]
        return x.double() * per_row[:, None, :, None]

    truth, _ = by_name(reference.forward)(
        wide(q, descale[0], 4, Q_LENS),
        wide(k, descale[1], 2, K_LENS),
        wide(v, descale[2], 2, K_LENS),
        softmax_scale=SCALE,
        **lengths,
    )
    for out in (None, torch.full(q.shape, torch.nan, dtype=torch.bfloat16, device="cuda")):
        got, _ = by_name(kernel.forward)(
            q,
            k,
            v,
            softmax_scale=SCALE,
            q_descale=descale[0],
            k_descale=descale[1],
            v_descale=descale[2],
            out=out,
            **lengths,
            **asked,
        )
        assert got.dtype == torch.bfloat16
        assert out is None or got is out
        assert (got.double() - truth).norm() <= 2**-4 * truth.norm()


@pytest.mark.parametrize("name", NAMES)
def test_packed_samples_with_a_number_of_keys(name):
    """`seqused_k` together with cu_seqlens_k: a sample's rows behind its valid ones are skipped."""
    kernel = kernel_for(name, {}, head_dim=128, seqused_k=True)
    q, k, v = tensors((sum(Q_LENS),), (sum(K_LENS),), 128)
    used = torch.tensor([120, 17, 0, 1], dtype=torch.int32, device="cuda")
    for tensor in (k, v):
        tensor[120:300] = torch.nan
        tensor[318:] = torch.nan
    agrees(kernel, q, k, v, cu_seqlens_q=ends(Q_LENS), cu_seqlens_k=ends(K_LENS), seqused_k=used)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_native_out_needs_no_second_result(name, strided):
    kernel = kernel_for(name, {}, head_dim=128, varlen=False)
    if kernel.out != "native":  # it says so, and then there is a second result
        pytest.skip(f"{name} copies into out")
    q, k, v = tensors((4, 2048), (4, 2048), 128)
    out = torch.empty_like(torch.cat([q, q], dim=2))[:, :, ::2] if strided else torch.empty_like(q)
    by_name(kernel.forward)(q, k, v, softmax_scale=SCALE, out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    by_name(kernel.forward)(q, k, v, softmax_scale=SCALE, out=out)
    assert torch.cuda.max_memory_allocated() - before < out.nbytes
