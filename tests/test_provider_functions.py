"""Functions with FlashAttention's arguments, in every spelling that real builds have."""

from __future__ import annotations

import pytest
import torch
from by_name import by_name
from schemas import OPS

from diffusers_fa3.errors import KernelUnavailableError
from diffusers_fa3.kernels.providers import reference
from diffusers_fa3.kernels.public_function import limits_of, public_forward, wrap_callable
from diffusers_fa3.kernels.signature import read_signature

SCALE = 0.37


@pytest.fixture
def packed():
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, 2, 8) for _ in range(3))
    cu_q = torch.tensor([0, 3, 7], dtype=torch.int32)
    cu_k = torch.tensor([0, 2, 7], dtype=torch.int32)
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 4, "max_seqlen_k": 5}
    return (q, k, v), lengths


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return [torch.randn(2, 5, 2, 8) for _ in range(3)]


def attend(q, k, v, cu_q, cu_k, scale, return_lse=False, **options):
    return by_name(reference.forward)(
        q,
        k,
        v,
        softmax_scale=scale,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        return_lse=return_lse,
        **options,
    )


# Signatures as in the builds they are named after.


def current(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    num_splits=1,
    return_attn_probs=False,
):
    out, lse = attend(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        softmax_scale,
        return_attn_probs,
        seqused_k=seqused_k,
        causal=causal,
        window=window_size,
        softcap=softcap,
    )
    return (out, lse) if return_attn_probs else out


def always_a_tuple(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None
):
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, return_lse=True)


def seqused_before_max(
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
    softmax_scale=None, causal=False,
):  # fmt: skip
    assert seqused_q is None
    return attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, True, seqused_k=seqused_k, causal=causal
    )


def max_before_cu(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None,
    softmax_scale=None, block_table=None, return_softmax_lse=False, out=None, num_splits=0,
    fa_version=2,
):  # fmt: skip
    assert (fa_version, num_splits, seqused_k, block_table) == (3, 1, None, None)
    result = attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, return_softmax_lse, out=out)
    return result if return_softmax_lse else result[0]


FUNCTIONS = [current, always_a_tuple, seqused_before_max, max_before_cu]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


@every_function
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("with_out", [False, True])
def test_a_packed_call_reaches_every_signature(packed, function, return_lse, with_out):
    (q, k, v), lengths = packed
    out = torch.empty_like(q) if with_out else None
    kernel = wrap_callable(function)
    got, lse = by_name(kernel.forward)(
        q, k, v, softmax_scale=SCALE, out=out, return_lse=return_lse, **lengths
    )
    want, want_lse = by_name(reference.forward)(
        q, k, v, softmax_scale=SCALE, return_lse=return_lse, **lengths
    )
    torch.testing.assert_close(got, want)
    assert (got is out) == with_out
    if return_lse:
        torch.testing.assert_close(lse, want_lse)
    else:
        assert lse is None
    assert kernel.out == ("native" if function is max_before_cu else "copy")


@every_function
@pytest.mark.parametrize("k_len", [5, 3])
def test_a_dense_call_is_laid_end_to_end(dense, function, k_len):
    q, k, v = dense
    k, v = k[:, :k_len], v[:, :k_len]
    kernel = wrap_callable(function)
    got, lse = by_name(kernel.forward)(q, k, v, softmax_scale=SCALE, return_lse=True)
    want, want_lse = by_name(reference.forward)(q, k, v, softmax_scale=SCALE, return_lse=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("function", [current, seqused_before_max], ids=lambda f: f.__name__)
def test_seqused_k_is_handed_on(dense, function):
    q, k, v = dense
    used = torch.tensor([5, 2], dtype=torch.int32)
    got, _ = by_name(wrap_callable(function).forward)(q, k, v, softmax_scale=SCALE, seqused_k=used)
    want, _ = by_name(reference.forward)(q, k, v, softmax_scale=SCALE, seqused_k=used)
    torch.testing.assert_close(got, want)


def test_all_options_are_handed_on(packed):
    (q, k, v), lengths = packed
    options = {"softmax_scale": SCALE, "causal": True, "window": (2, 0), "softcap": 0.8}
    got, _ = by_name(wrap_callable(current).forward)(q, k, v, **options, **lengths)
    want, _ = by_name(reference.forward)(q, k, v, **options, **lengths)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"causal": True}, "causal"),
        ({"window": (2, 0)}, "window_size"),
        ({"softcap": 1.0}, "softcap"),
        ({"seqused_k": torch.ones(2)}, "seqused_k"),
        ({"q_descale": torch.ones(1)}, "q_descale"),
    ],
    ids=["causal", "window", "softcap", "seqused_k", "q_descale"],
)
def test_an_option_that_a_function_lacks_is_refused_and_not_dropped(packed, option, words):
    (q, k, v), lengths = packed
    kernel = wrap_callable(always_a_tuple)
    with pytest.raises(KernelUnavailableError, match=f"always_a_tuple cannot take {words}"):
        by_name(kernel.forward)(q, k, v, softmax_scale=SCALE, **lengths, **option)


def test_limits_follow_from_the_signature():
    limits = limits_of(read_signature(current))
    assert (limits.varlen, limits.seqused_k, limits.window, limits.softcap) == (True,) * 4
    limits = limits_of(read_signature(always_a_tuple))
    assert (limits.varlen, limits.seqused_k, limits.window, limits.softcap) == (True, *[False] * 3)
    assert not limits_of(read_signature(max_before_cu)).seqused_k


def test_a_function_for_dense_tensors_serves_those_only(dense):
    def dense_only(q, k, v, softmax_scale=None, causal=False):
        return by_name(reference.forward)(q, k, v, softmax_scale=softmax_scale, causal=causal)[0]

    kernel = wrap_callable(dense_only)
    assert not kernel.limits.varlen
    got, _ = by_name(kernel.forward)(*dense, softmax_scale=SCALE, causal=True)
    torch.testing.assert_close(
        got, by_name(reference.forward)(*dense, softmax_scale=SCALE, causal=True)[0]
    )
    with pytest.raises(KernelUnavailableError, match="dense_only cannot take seqused_k"):
        by_name(kernel.forward)(*dense, softmax_scale=SCALE, seqused_k=torch.ones(2))


def test_keywords_of_which_nothing_is_known_get_what_is_asked_and_no_more(packed):
    (q, k, v), lengths = packed
    got = {}

    def anything(q, k, v, **options):
        got.update(options)
        return q

    by_name(wrap_callable(anything).forward)(
        q, k, v, softmax_scale=SCALE, causal=True, window=(-1, -1), softcap=0.0, **lengths
    )
    assert got.keys() == {*lengths, "softmax_scale", "causal"}


def test_dense_calls_go_to_the_dense_function_of_a_build(packed, dense):
    called = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k=None, softmax_scale=None):
        called.append("varlen")
        return q

    def for_dense(q, k, v, softmax_scale=None):
        called.append("dense")
        return q

    forward = by_name(public_forward(varlen, for_dense))
    forward(*dense, softmax_scale=SCALE)
    forward(*dense, softmax_scale=SCALE, seqused_k=torch.ones(2, dtype=torch.int32))
    (q, k, v), lengths = packed
    lengths = {name: x for name, x in lengths.items() if name.startswith("cu")}
    forward(q, k, v, softmax_scale=SCALE, **lengths)
    assert called == ["dense", "varlen", "varlen"]


def test_out_of_a_dense_call_is_written_through_a_view(dense):
    q, k, v = dense
    seen = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, out=None):
        seen.append(out)
        return out.copy_(q)

    def without(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale):
        return q.clone()

    # A function without `softmax_scale` can serve the default scale only.
    with pytest.raises(KernelUnavailableError, match="varlen cannot take softmax_scale"):
        by_name(wrap_callable(varlen).forward)(
            q, k, v, softmax_scale=SCALE, out=torch.empty_like(q)
        )
    out = torch.empty_like(q)
    by_name(wrap_callable(varlen).forward)(q, k, v, softmax_scale=8**-0.5, out=out)
    assert seen[-1].data_ptr() == out.data_ptr()
    assert torch.equal(out, q)
    for out in (torch.empty_like(q), torch.empty(2, 6, 2, 8)[:, 1:]):
        got, _ = by_name(wrap_callable(without).forward)(q, k, v, softmax_scale=SCALE, out=out)
        assert got is out
        assert torch.equal(out, q)


def test_gradients_flow_through_a_function_that_has_them(packed):
    (q, k, v), lengths = packed
    k.requires_grad_()
    out, _ = by_name(wrap_callable(current).forward)(q, k, v, softmax_scale=SCALE, **lengths)
    assert out.requires_grad


def test_a_result_without_gradient_is_an_error_where_one_is_needed(packed):
    (q, k, v), lengths = packed

    def detached(*args, **kwargs):
        with torch.no_grad():
            return current(*args, **kwargs)

    k.requires_grad_()
    with pytest.raises(KernelUnavailableError, match="detached returned a result without gradient"):
        by_name(wrap_callable(detached).forward)(q, k, v, softmax_scale=SCALE, **lengths)


def test_a_log_sum_exp_that_does_not_come_is_an_error(packed):
    (q, k, v), lengths = packed

    def no_lse(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale):
        return q

    with pytest.raises(
        KernelUnavailableError,
        match="no_lse returned no log-sum-exp, but 1 results; it is the second of them",
    ):
        by_name(wrap_callable(no_lse).forward)(
            q, k, v, softmax_scale=SCALE, return_lse=True, **lengths
        )


def test_empty_rows_are_minus_inf_where_the_kernel_says_plus_inf(packed):
    (q, k, v), lengths = packed

    def plus(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale):
        return q, torch.tensor([[1.0, torch.inf, -torch.inf]])

    _, lse = by_name(wrap_callable(plus).forward)(
        q, k, v, softmax_scale=SCALE, return_lse=True, **lengths
    )
    assert lse.tolist() == [[1.0, -torch.inf, -torch.inf]]


def test_a_function_that_requires_something_else_is_refused():
    def strange(q, k, v, page_directory, softmax_scale=None):
        return q

    with pytest.raises(KernelUnavailableError, match="strange requires page_directory"):
        wrap_callable(strange)


def test_a_raw_op_is_called_by_its_schema(packed):
    (q, k, v), lengths = packed
    kernel = wrap_callable(OPS["sgl_0_4_10"].op)
    got, _ = by_name(kernel.forward)(q, k, v, softmax_scale=SCALE, **lengths)
    want, _ = by_name(reference.forward)(q, k, v, softmax_scale=SCALE, **lengths)
    torch.testing.assert_close(got, want)
    assert kernel.out == "native"


def test_what_a_function_raises_passes(packed):
    (q, k, v), lengths = packed

    def fails(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale):
        raise TypeError("inside")

    with pytest.raises(TypeError, match=r"^inside$"):
        by_name(wrap_callable(fails).forward)(q, k, v, softmax_scale=SCALE, **lengths)
