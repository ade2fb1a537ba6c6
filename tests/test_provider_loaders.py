"""What kernel each provider loads from its package, with stand-ins for the packages."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from by_name import by_name
from schemas import OPS
from test_provider_functions import current

from diffusers_fa3.errors import KernelUnavailableError
from diffusers_fa3.kernels import PROVIDERS
from diffusers_fa3.kernels.installed import kernel_named
from diffusers_fa3.kernels.providers import flash_attn_4, reference, torch_varlen
from diffusers_fa3.kernels.providers.torch_varlen import Varlen
from diffusers_fa3.kernels.selection import Selector

SCALE = 0.37
BY_NAME = {p.name: p for p in PROVIDERS}


@pytest.fixture
def packed():
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, 2, 8) for _ in range(3))
    cu_q = torch.tensor([0, 3, 7], dtype=torch.int32)
    cu_k = torch.tensor([0, 2, 7], dtype=torch.int32)
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 4, "max_seqlen_k": 5}
    return (q, k, v), lengths


@pytest.fixture
def install(monkeypatch):
    def put(name, **contents):
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def dense(q, k, v, softmax_scale=None, causal=False):
    return by_name(reference.forward)(q, k, v, softmax_scale=softmax_scale, causal=causal)[0]


def disabled(*features):
    names = [f"FLASHATTENTION_DISABLE_{feature}" for feature in features]
    return {"build_flags": dict.fromkeys(names, True)}


def agrees(kernel, packed):
    (q, k, v), lengths = packed
    got, lse = by_name(kernel.forward)(q, k, v, softmax_scale=SCALE, return_lse=True, **lengths)
    want, want_lse = by_name(reference.forward)(
        q, k, v, softmax_scale=SCALE, return_lse=True, **lengths
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(lse, want_lse)


def put_op(monkeypatch, namespace, name):
    monkeypatch.setattr(getattr(torch.ops, namespace), "fwd", OPS[name].op, raising=False)


def cached(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
):  # fmt: skip
    """A kv-cache call with FlashAttention-2's arguments, as in old FlashAttention-3 builds."""
    out, lse = reference.kvcache(
        q, k_cache, v_cache, k=k, v=v, cache_seqlens=cache_seqlens, page_table=block_table,
        softmax_scale=softmax_scale, causal=causal, return_lse=True,
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out


def agrees_on_a_cache(kernel):
    """Appended keys, pages, `out` and the LSE are the same as on the reference."""
    q, k, v = (torch.randn(2, 1, 2, 8) for _ in range(3))
    caches = [torch.randn(4, 4, 2, 8) for _ in range(2)]  # pages of 4 keys
    pages = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    lens = torch.tensor([3, 5], dtype=torch.int32)
    options = {"cache_seqlens": lens, "page_table": pages, "causal": True, "softmax_scale": SCALE}
    ours, theirs = ([x.clone() for x in caches] for _ in range(2))
    out = torch.empty_like(q)
    got, lse = kernel.kvcache(q, *ours, k=k, v=v, **options, out=out, return_lse=True)
    want, want_lse = reference.kvcache(q, *theirs, k=k, v=v, **options, return_lse=True)
    assert got is out
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(lse, want_lse)
    assert torch.equal(ours[0], theirs[0])
    assert not torch.equal(ours[0], caches[0])
    plain, nothing = kernel.kvcache(q, *caches, **options)
    assert plain.shape == q.shape
    assert nothing is None


def test_flash_attn_3_is_its_raw_op(monkeypatch, install, packed):
    put_op(monkeypatch, "flash_attn_3", "tokenspeed")
    install("flash_attn_interface", flash_attn_varlen_func=current, flash_attn_func=dense)
    install("flash_attn_config", CONFIG=disabled("BACKWARD", "SOFTCAP", "SM8x"))
    kernel = BY_NAME["flash_attn_3"].load()
    calls = len(OPS["tokenspeed"].calls)
    agrees(kernel, packed)
    assert len(OPS["tokenspeed"].calls) == calls + 1
    assert (kernel.out, kernel.limits.backward, kernel.limits.softcap) == ("native", False, False)
    assert kernel.limits.archs == ("sm90a",)
    assert kernel.kvcache is not None


def test_flash_attn_3_trains_through_its_functions(monkeypatch, install, packed):
    put_op(monkeypatch, "flash_attn_3", "upstream")
    install("flash_attn_interface", flash_attn_varlen_func=current, flash_attn_func=dense)
    install("flash_attn_config", CONFIG=disabled())
    kernel = BY_NAME["flash_attn_3"].load()
    assert kernel.limits.backward
    (q, k, v), lengths = packed
    out, _ = by_name(kernel.forward)(q.requires_grad_(), k, v, softmax_scale=SCALE, **lengths)
    out.sum().backward()
    assert q.grad is not None


def test_an_old_flash_attn_3_without_an_op_is_its_functions(monkeypatch, install, packed):
    monkeypatch.setattr(torch.ops.flash_attn_3, "fwd", None, raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn_config", None)
    install(
        "flash_attn_interface",
        flash_attn_varlen_func=current,
        flash_attn_func=dense,
        flash_attn_with_kvcache=cached,
    )
    kernel = BY_NAME["flash_attn_3"].load()
    agrees(kernel, packed)
    assert (kernel.out, kernel.limits.kvcache) == ("copy", True)
    agrees_on_a_cache(kernel)


def test_fa3_fwd_has_its_own_namespace_and_flags(monkeypatch, install, packed):
    put_op(monkeypatch, "fa3_fwd", "fa3_fwd")
    install("fa3_fwd_interface")
    install("fa3_fwd_config", CONFIG=disabled("BACKWARD", "PAGEDKV", "LOCAL", "FP16"))
    kernel = BY_NAME["fa3_fwd"].load()
    agrees(kernel, packed)
    limits = kernel.limits
    assert (limits.window, limits.softcap, limits.backward) == (False, True, False)
    assert limits.dtypes == {torch.bfloat16, torch.float8_e4m3fn}


def test_sgl_kernel_is_its_raw_op(monkeypatch, install, packed):
    put_op(monkeypatch, "sgl_kernel", "sgl_0_4_10")
    install("sgl_kernel")
    install("sgl_kernel.flash_attn")
    agrees(BY_NAME["sgl_kernel"].load(), packed)


def test_vllm_only_gets_packed_calls(monkeypatch, install, packed):
    put_op(monkeypatch, "_vllm_fa3_C", "vllm")
    install("vllm")
    install("vllm.vllm_flash_attn")
    kernel = BY_NAME["vllm"].load()
    agrees(kernel, packed)
    q, k, v = (torch.randn(2, 5, 2, 8) for _ in range(3))
    out = torch.empty_like(q)
    used = torch.tensor([5, 3], dtype=torch.int32)
    padding = torch.arange(5) >= used[:, None]
    want, want_lse = by_name(reference.forward)(
        q, k, v, softmax_scale=SCALE, seqused_k=used, return_lse=True
    )
    unsafe = v.masked_fill(padding[..., None, None], torch.nan)
    for values, is_safe in ((unsafe, False), (v, True)):
        got, lse = by_name(kernel.forward)(
            q,
            k,
            values,
            softmax_scale=SCALE,
            seqused_k=used,
            padding_is_safe=is_safe,
            out=out,
            return_lse=True,
        )
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(lse, want_lse)
        assert got is out
    last = OPS["vllm"].last
    assert last["cu_seqlens_q"].tolist() == last["cu_seqlens_k"].tolist() == [0, 5, 10]
    assert last["out"].data_ptr() == out.data_ptr()
    assert (last["max_seqlen_q"], last["max_seqlen_k"]) == (5, 5)


def test_the_hub_is_asked_for_one_fixed_version(install, packed):
    asked = []
    build = ModuleType("build_1234")
    build.flash_attn_interface = SimpleNamespace(
        flash_attn_3_cuda=SimpleNamespace(fwd=OPS["upstream"].op)
    )

    def get_kernel(repo_id, *, revision=None, version=None):
        asked.append((repo_id, revision, version))
        return build

    install("kernels", get_kernel=get_kernel)
    install("build_1234")
    install("build_1234.flash_attn_config", CONFIG=disabled("FP8"))
    kernel = BY_NAME["hub"].load()
    assert asked == [("kernels-community/flash-attn3", None, 1)]
    assert torch.float8_e4m3fn not in kernel.limits.dtypes
    agrees(kernel, packed)


def test_the_hub_is_asked_in_terms_that_the_real_library_knows():
    get_kernel = pytest.importorskip("kernels").get_kernel
    inspect.signature(get_kernel).bind("kernels-community/flash-attn3", version=1)


def test_flash_attn_2_is_its_functions(install, packed):
    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        out, lse = by_name(reference.forward)(
            q, k, v, softmax_scale=softmax_scale, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k, return_lse=True,
        )  # fmt: skip
        return (out, lse, None) if return_attn_probs else out

    install(
        "flash_attn",
        flash_attn_varlen_func=varlen,
        flash_attn_func=dense,
        flash_attn_with_kvcache=cached,
    )
    kernel = BY_NAME["flash_attn_2"].load()
    agrees(kernel, packed)
    assert (kernel.out, kernel.limits.seqused_k) == ("copy", False)
    agrees_on_a_cache(kernel)
    q, k_cache, v_cache = (torch.randn(2, 4, 2, 8) for _ in range(3))
    with pytest.raises(KernelUnavailableError, match="cannot take cu_seqlens_q"):
        kernel.kvcache(q, k_cache, v_cache, softmax_scale=SCALE, cu_seqlens_q=torch.ones(3))


class FakeFlashAttention4:
    """A private forward that takes `out`, and functions that always return two values."""

    def __init__(self):
        self.calls = []

    def _attend(self, name, q, k, v, softmax_scale, out=None, **options):
        self.calls.append((name, options | {"out": out}))
        lengths = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
        return by_name(reference.forward)(
            q,
            k,
            v,
            softmax_scale=softmax_scale,
            out=out,
            return_lse=options.get("return_lse", False),
            **{n: options[n] for n in lengths if n in options},
        )

    def private(
        self, q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, return_lse=False, out=None, lse=None,
    ):  # fmt: skip
        options = {k: x for k, x in locals().items() if x is not None and k not in ("self", "lse")}
        return (*self._attend("private", **options), None, None, None)

    def varlen(
        self, q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, seqused_k=None, softmax_scale=None, causal=False,
        window_size=(None, None), softcap=0.0, return_lse=False,
    ):  # fmt: skip
        options = {k: x for k, x in locals().items() if x is not None and k != "self"}
        return self._attend("varlen", **options)

    def dense(
        self, q, k, v, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0
    ):
        return self._attend("dense", q, k, v, softmax_scale, window_size=window_size)


class TestFlashAttention4:
    @pytest.fixture
    def fake(self):
        return FakeFlashAttention4()

    @pytest.mark.parametrize("private", [True, False])
    @pytest.mark.parametrize("return_lse", [True, False])
    def test_packed_calls(self, fake, packed, private, return_lse):
        forward = by_name(
            flash_attn_4.bind(fake.private if private else None, fake.varlen, fake.dense)
        )
        (q, k, v), lengths = packed
        out = torch.empty_like(q)
        got, lse = forward(q, k, v, softmax_scale=SCALE, out=out, return_lse=return_lse, **lengths)
        want, _ = by_name(reference.forward)(q, k, v, softmax_scale=SCALE, **lengths)
        torch.testing.assert_close(got, want)
        assert got is out
        assert (lse is not None) == return_lse
        name, options = fake.calls[-1]
        assert name == ("private" if private else "varlen")
        assert (options["out"] is out) == private

    def test_an_unlimited_side_of_a_window_is_none(self, fake, packed):
        forward = by_name(flash_attn_4.bind(fake.private, fake.varlen, fake.dense))
        (q, k, v), lengths = packed
        forward(q, k, v, softmax_scale=SCALE, window=(3, -1), **lengths)
        assert fake.calls[-1][1]["window_size_left"] == 3
        assert "window_size_right" not in fake.calls[-1][1]

    def test_gradients_go_through_its_functions(self, fake, packed):
        forward = by_name(flash_attn_4.bind(fake.private, fake.varlen, fake.dense))
        (q, k, v), lengths = packed
        out, _ = forward(q.requires_grad_(), k, v, softmax_scale=SCALE, **lengths)
        assert out.requires_grad
        assert fake.calls[-1][0] == "varlen"
        assert fake.calls[-1][1]["window_size"] == (None, None)

    def test_dense_calls_have_no_lengths(self, fake):
        forward = by_name(flash_attn_4.bind(None, fake.varlen, fake.dense))
        q, k, v = (torch.randn(2, 5, 2, 8) for _ in range(3))
        got, lse = forward(q, k, v, softmax_scale=SCALE, max_seqlen_q=5)
        torch.testing.assert_close(got, dense(q, k, v, SCALE))
        assert lse is None
        assert fake.calls[-1][0] == "dense"
        with pytest.raises(KernelUnavailableError, match="no log-sum-exp"):
            forward(q, k, v, softmax_scale=SCALE, return_lse=True)

    def test_float8_is_refused(self, fake, packed):
        forward = by_name(flash_attn_4.bind(fake.private, fake.varlen, fake.dense))
        (q, k, v), lengths = packed
        with pytest.raises(KernelUnavailableError, match="flash_attn_4 cannot take k_descale"):
            forward(q, k, v, softmax_scale=SCALE, k_descale=torch.ones(2, 2), **lengths)

    def test_its_package_is_found_beside_flash_attn_2(self, install, packed, fake):
        functions = {"flash_attn_varlen_func": fake.varlen, "flash_attn_func": fake.dense}
        install("flash_attn", __path__=[])
        install("flash_attn.cute", __spec__=ModuleSpec("flash_attn.cute", None), **functions)
        install("flash_attn.cute.interface", _flash_attn_fwd=fake.private)
        kernel = BY_NAME["flash_attn_4"].load()
        agrees(kernel, packed)
        assert kernel.out == "native"


def test_two_packages_share_a_name_and_each_may_be_there_alone(install):
    install("flash_attn", __path__=[])
    for name, other in (("flash_attn_2", "flash-attn-4"), ("flash_attn_4", "flash-attn")):
        with pytest.raises(KernelUnavailableError, match=f"as {other} alone installs it$"):
            BY_NAME[name].load()
        with pytest.raises(KernelUnavailableError, match=rf"\({BY_NAME[name].install}\)$"):
            Selector([BY_NAME[name]]).kernel_named(name)


class AuxRequest(SimpleNamespace):
    pass


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
    return_aux=None, scale=None, window_size=(-1, -1),
):  # fmt: skip
    got = {"window_size": window_size, "max_q": max_q, "max_k": max_k}
    varlen_2_11.got = got
    out, lse = by_name(reference.forward)(
        query, key, value, softmax_scale=scale, cu_seqlens_q=cu_seq_q, cu_seqlens_k=cu_seq_k,
        causal=window_size[1] == 0, return_lse=True,
    )  # fmt: skip
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # as FlashAttention-2 marks empty rows
    return (out, lse) if return_aux is not None and return_aux.lse else out


def varlen_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
    return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None,
    block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    varlen_2_13.got = {"num_splits": num_splits, "window_size": window_size}
    out, lse = by_name(reference.forward)(
        query, key, value, softmax_scale=scale, cu_seqlens_q=cu_seq_q, cu_seqlens_k=cu_seq_k,
        seqused_k=seqused_k, causal=window_size[1] == 0, return_lse=True,
    )  # fmt: skip
    return (out, lse) if return_aux is not None and return_aux.lse else out


def varlen_out_2_13(out, *arguments, **options):
    varlen_out_2_13.got = out
    result = varlen_2_13(*arguments, **options)
    lse = result[1:] if isinstance(result, tuple) else ()
    out.copy_(result[0] if lse else result)
    return (out, *lse) if lse else out


class TestTorchVarlen:
    old = Varlen(varlen_2_11, None, AuxRequest)
    new = Varlen(varlen_2_13, varlen_out_2_13, AuxRequest)

    @pytest.mark.parametrize("version", [old, new], ids=["2.11", "2.13"])
    @pytest.mark.parametrize("return_lse", [True, False])
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("kv_heads", [1, 2])
    def test_packed_calls(self, packed, version, return_lse, causal, kv_heads):
        (q, k, v), lengths = packed
        k, v = k[:, :kv_heads], v[:, :kv_heads]
        options = {"softmax_scale": SCALE, "causal": causal, "return_lse": return_lse, **lengths}
        out = torch.empty_like(q)
        got, lse = by_name(version.forward)(q, k, v, out=out, **options)
        want, want_lse = by_name(reference.forward)(q, k, v, **options)
        torch.testing.assert_close(got, want)
        assert got is out
        if return_lse:
            torch.testing.assert_close(lse, want_lse)  # -inf in empty rows, not +inf

    def test_causal_is_a_window(self, packed):
        (q, k, v), lengths = packed
        for options, window in [
            ({"causal": True}, (-1, 0)),
            ({"causal": True, "window": (3, -1)}, (3, 0)),
            ({"window": (3, 1)}, (3, 1)),
            ({}, (-1, -1)),
        ]:
            by_name(self.new.forward)(q, k, v, softmax_scale=SCALE, **lengths, **options)
            assert varlen_2_13.got["window_size"] == window

    def test_out_is_written_natively(self, packed):
        (q, k, v), lengths = packed
        out = torch.empty_like(q)
        by_name(self.new.forward)(q, k, v, softmax_scale=SCALE, out=out, **lengths)
        assert varlen_out_2_13.got is out

    def test_out_is_copied_where_grouped_heads_decode(self, packed):
        (q, k, v), lengths = packed
        q, varlen_out_2_13.got = q[:2], None
        lengths |= {"cu_seqlens_q": torch.tensor([0, 1, 2], dtype=torch.int32), "max_seqlen_q": 1}
        out = torch.empty_like(q)
        got, _ = by_name(self.new.forward)(
            q, k[:, :1], v[:, :1], softmax_scale=SCALE, out=out, **lengths
        )
        assert got is out
        assert varlen_out_2_13.got is None

    def test_keys_are_never_split(self, packed):
        (q, k, v), lengths = packed
        by_name(self.new.forward)(q, k, v, softmax_scale=SCALE, **lengths)
        assert varlen_2_13.got["num_splits"] == 1

    @pytest.mark.parametrize("name", ["softcap", "q_descale"])
    def test_what_it_lacks_is_refused(self, packed, name):
        (q, k, v), lengths = packed
        with pytest.raises(KernelUnavailableError, match=f"torch_varlen cannot take {name}"):
            by_name(self.new.forward)(q, k, v, softmax_scale=SCALE, **{name: 1.0}, **lengths)

    def test_seqused_k_is_refused_where_torch_is_too_old(self, packed):
        (q, k, v), lengths = packed
        with pytest.raises(KernelUnavailableError, match="torch_varlen cannot take seqused_k"):
            by_name(self.old.forward)(
                q, k, v, softmax_scale=SCALE, seqused_k=torch.ones(2), **lengths
            )

    def test_the_real_functions_take_what_they_are_given(self):
        torch_module = pytest.importorskip("torch.nn.attention.varlen")
        options = ("return_aux", "scale", "window_size", "enable_gqa", "seqused_k", "num_splits")
        given = dict.fromkeys(options)
        inspect.signature(torch_module.varlen_attn).bind(*"qkv", *range(4), **given)
        inspect.signature(torch_module.varlen_attn_out).bind("out", *"qkv", *range(4), **given)
        assert torch_module.AuxRequest(lse=True).lse
        kernel = torch_varlen.load()
        assert (kernel.out, kernel.limits.seqused_k) == ("native", True)

    def test_a_torch_without_a_scale_is_refused(self, install):
        def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
            raise AssertionError

        install("torch.nn.attention.varlen", varlen_attn=varlen_attn)
        with pytest.raises(KernelUnavailableError, match=r"from torch 2\.11 on"):
            torch_varlen.load()

    def test_a_torch_that_lacks_it_says_which_one_has_it(self):
        if importlib.util.find_spec("torch.nn.attention.varlen"):
            pytest.skip("this torch has it")
        with pytest.raises(KernelUnavailableError, match=r"not installed \(pip .*torch>=2\.12"):
            kernel_named("torch_varlen")


def test_every_loader_fails_with_an_import_error_where_its_package_is_missing():
    missing = [p for p in PROVIDERS if p.modules and importlib.util.find_spec(p.modules[0]) is None]
    for provider in missing:
        with pytest.raises(ModuleNotFoundError, match=provider.modules[0].split("_")[0]):
            provider.load()
