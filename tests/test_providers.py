"""Which kernel serves a call follows from given facts, so an H100 is tested on any machine."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from diffusers_fa3.errors import InputError, KernelUnavailableError
from diffusers_fa3.kernels import (
    PROVIDERS,
    Kernel,
    Request,
    available_kernels,
    selection,
)
from diffusers_fa3.kernels import installed as of_this_machine
from diffusers_fa3.kernels.build_flags import FULL_BUILD, limits_from
from diffusers_fa3.kernels.contract import (
    FLOAT8,
    HALF,
    Limits,
    Machine,
    Provider,
    rejection_reasons,
)
from diffusers_fa3.kernels.providers.flash_attn_2 import LIMITS as FA2_LIMITS
from diffusers_fa3.kernels.providers.flash_attn_4 import LIMITS as FA4_LIMITS
from diffusers_fa3.kernels.providers.reference import LIMITS as REFERENCE_LIMITS
from diffusers_fa3.kernels.providers.torch_varlen import load as load_torch_varlen
from diffusers_fa3.kernels.selection import CALLABLES_KEPT, Selector

H100 = Machine("cuda", (9, 0))
A100 = Machine("cuda", (8, 0))
RTX_4090 = Machine("cuda", (8, 9))
B200 = Machine("cuda", (10, 0))
CPU = Machine("cpu", None)
BF16 = Request(torch.bfloat16, 128, 128)
FP16 = BF16._replace(dtype=torch.float16)

TOKENSPEED = dict.fromkeys(("BACKWARD", "SOFTCAP", "HDIM96", "SM8x"), True)
FA3_FWD = dict.fromkeys(("BACKWARD", "PAGEDKV", "LOCAL", "FP16"), True)


def torch_varlen_limits():
    """The limits on a torch that has `varlen_attn`; the installed torch may be too old."""
    module = SimpleNamespace(
        varlen_attn=lambda scale, window_size, seqused_k: None, AuxRequest=None
    )
    with mock.patch.dict(sys.modules, {"torch.nn.attention.varlen": module}):
        return load_torch_varlen().limits


def flags(disabled):
    return {f"FLASHATTENTION_DISABLE_{feature}": True for feature in disabled}


LIMITS = {
    "flash_attn_3": replace(FULL_BUILD, backward=True),
    "tokenspeed": limits_from(flags(TOKENSPEED)),
    "fa3_fwd": limits_from(flags(FA3_FWD)),
    "sgl_kernel": FULL_BUILD,
    "vllm": FULL_BUILD,
    "hub": FULL_BUILD,
    "flash_attn_4": FA4_LIMITS,
    "torch_varlen": torch_varlen_limits(),
    "flash_attn_2": FA2_LIMITS,
    "reference": REFERENCE_LIMITS,
}


def forward(q, k, v, **options):
    return q, None


def installed(*names, **builds):
    """The real providers in their real order, with only the named ones installed."""

    def provided(provider):
        limits = LIMITS.get(builds.get(provider.name, provider.name))
        kernel = Kernel(provider.name, "1.0", limits, forward)
        if provider.name in (*names, *builds, "torch_varlen", "reference"):
            return replace(provider, load=lambda: kernel, modules=())
        return replace(provider, modules=("no_such_module",))

    return Selector(provided(provider) for provider in PROVIDERS)


EVERYTHING = tuple(LIMITS)

CHOICES = {
    "H100, bf16": (installed("flash_attn_3", "fa3_fwd"), H100, BF16, "flash_attn_3"),
    "H100, fp16, tokenspeed": (installed(flash_attn_3="tokenspeed"), H100, FP16, "flash_attn_3"),
    "H100, fp16, only fa3-fwd": (installed("fa3_fwd"), H100, FP16, "torch_varlen"),
    "H100, bf16, only fa3-fwd": (installed("fa3_fwd"), H100, BF16, "fa3_fwd"),
    "H100, fp8": (
        installed("flash_attn_3"),
        H100,
        BF16._replace(dtype=torch.float8_e4m3fn),
        "flash_attn_3",
    ),
    "H100, window, only fa3-fwd": (
        installed("fa3_fwd"),
        H100,
        BF16._replace(window=True),
        "torch_varlen",
    ),
    "H100, softcap, tokenspeed and FA2": (
        installed("flash_attn_2", flash_attn_3="tokenspeed"),
        H100,
        BF16._replace(softcap=True),
        "flash_attn_2",
    ),
    "H100, training, tokenspeed": (
        installed(flash_attn_3="tokenspeed"),
        H100,
        BF16._replace(backward=True),
        "torch_varlen",
    ),
    "H100, training, upstream": (
        installed("flash_attn_3"),
        H100,
        BF16._replace(backward=True),
        "flash_attn_3",
    ),
    "H100, nothing installed": (installed(), H100, BF16, "torch_varlen"),
    "H100, FA4 only": (installed("flash_attn_4"), H100, BF16, "flash_attn_4"),
    "A100, tokenspeed has no code for it": (
        installed(flash_attn_3="tokenspeed"),
        A100,
        BF16,
        "torch_varlen",
    ),
    "A100, upstream": (installed("flash_attn_3"), A100, BF16, "flash_attn_3"),
    "RTX 4090, fa3-fwd runs its sm80 code": (installed("fa3_fwd"), RTX_4090, BF16, "fa3_fwd"),
    "RTX 4090, nothing installed": (installed(), RTX_4090, BF16, "torch_varlen"),
    "B200, everything": (installed(*EVERYTHING), B200, BF16, "flash_attn_4"),
    "B200, FA3 only": (installed("flash_attn_3"), B200, BF16, "torch_varlen"),
    "CPU": (installed(*EVERYTHING), CPU, FP16, "reference"),
    "CPU, fp32, odd head size": (
        installed(),
        CPU,
        Request(torch.float32, 37, 11, backward=True),
        "reference",
    ),
    "Apple": (installed(), Machine("mps", None), FP16, "reference"),
}


@pytest.mark.parametrize("case", list(CHOICES))
def test_auto_takes_the_best_kernel_that_can(case):
    selector, machine, request_, want = CHOICES[case]
    assert selector.select(request_, machine, "auto").name == want
    assert selector.select(request_, machine, "auto").name == want


REFUSALS = {
    "fp32": (BF16._replace(dtype=torch.float32), "float32 at head size 128 on a cuda device"),
    "head size 512": (Request(torch.bfloat16, 512, 512), "bfloat16 at head size 512 on a cuda"),
    "head sizes that differ": (Request(torch.bfloat16, 64, 32), r"head size 64 \(v: 32\) on"),
    "head size 60": (Request(torch.float16, 60, 60), "float16 at head size 60 on a cuda device"),
    "fp8 and head size 72": (Request(torch.float8_e4m3fn, 72, 72), "float8_e4m3fn at head size 72"),
    "several": (BF16._replace(dtype=torch.float64, window=True, lse=True), "with window, lse on"),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_what_no_kernel_can_is_refused_in_one_line_and_with_every_reason(case):
    request_, words = REFUSALS[case]
    selector = installed("flash_attn_3", "fa3_fwd")
    for _ in range(2):
        with pytest.raises(KernelUnavailableError, match=words) as caught:
            selector.select(request_, H100, "auto")
        summary, *lines, advice = str(caught.value).splitlines()
        assert caught.value.summary == summary
        assert summary.startswith("no kernel serves ")
        assert summary.endswith("on a cuda device of compute capability 9.0")
        assert [line.split(":")[0].strip() for line in lines] == [p.name for p in PROVIDERS]
        assert 'kernel="reference"' in advice


def test_every_line_of_a_refusal_says_why_and_how_to_get_it():
    selector = installed("flash_attn_3", "sgl_kernel")
    with pytest.raises(KernelUnavailableError, match="serves") as caught:
        selector.select(BF16._replace(dtype=torch.float32), H100, "auto")
    lines = dict(line.strip().split(": ", 1) for line in str(caught.value).splitlines()[1:-1])
    assert lines["flash_attn_3"] == "serves bfloat16, float16, float8_e4m3fn; got float32"
    assert lines["fa3_fwd"] == "not installed (pip install fa3-fwd)"
    assert lines["vllm"].startswith("only by name, since importing vllm is slow")
    assert lines["hub"].startswith("only by name, since it downloads")
    assert lines["reference"].startswith("only by name on a CUDA device")


def test_the_reference_serves_on_a_cuda_device_when_it_is_asked_for():
    request_ = BF16._replace(dtype=torch.float32)
    assert installed().select(request_, H100, "reference").name == "reference"


def watching_loads(asked):
    """The real providers; a load of one for which `asked` is true is noted and fails."""
    loaded = []

    def watched(provider):
        def load():
            loaded.append(provider.name)
            raise ImportError("noted")

        return replace(provider, load=load, modules=())

    return Selector(watched(p) if asked(p) else p for p in PROVIDERS), loaded


def test_neither_the_hub_nor_vllm_is_loaded_unless_it_is_asked_for():
    assert {p.name for p in PROVIDERS if p.on_request} == {"hub", "vllm"}
    selector, loaded = watching_loads(lambda provider: provider.on_request)
    selector.select(BF16, CPU, "auto")
    selector.available(H100)
    selector.select(BF16, H100, "reference")
    with pytest.raises(KernelUnavailableError, match="no kernel serves float32"):
        selector.select(BF16._replace(dtype=torch.float32), H100, "auto")
    assert loaded == []
    with pytest.raises(KernelUnavailableError, match="ImportError: noted"):
        selector.select(BF16, H100, "hub")
    assert loaded == ["hub"]


def test_nothing_is_loaded_for_a_device_that_it_cannot_serve():
    selector, loaded = watching_loads(lambda provider: provider.cuda)
    assert selector.select(BF16, CPU).name == "reference"
    assert [row.name for row in selector.available(CPU) if row.accepted] == ["reference"]
    assert loaded == []


def test_a_name_is_honoured_or_refused_with_every_reason():
    selector = installed("flash_attn_3", "fa3_fwd")
    assert selector.select(BF16, H100, "fa3_fwd").name == "fa3_fwd"
    request_ = FP16._replace(window=True, head_dim=520)
    with pytest.raises(KernelUnavailableError, match='"fa3_fwd" cannot serve float16') as caught:
        selector.select(request_, B200, "fa3_fwd")
    for reason in (
        "has code for sm80, sm90a; this is a cuda device of compute capability 10.0",
        "serves bfloat16, float8_e4m3fn; got float16",
        "serves head sizes that are multiples of 8 up to 256; got 520",
        "needs one head size; got 520 for q and k, 128 for v",
        "built without window",
    ):
        assert reason in str(caught.value)
        assert reason in caught.value.summary
    assert "\n" not in caught.value.summary
    assert str(caught.value).endswith('Say kernel="auto" to take one that can')


def test_an_unknown_name_is_answered_with_the_known_ones():
    words = 'no kernel is called "fa3-fwd"; kernel is one of auto, fastest, flash_attn_3, '
    with pytest.raises(KernelUnavailableError, match=words):
        installed().select(BF16, H100, "fa3-fwd")


def test_a_kernel_that_is_not_installed_is_answered_with_what_to_type():
    words = r'kernel "fa3_fwd" is not installed \(pip install fa3-fwd\)'
    with pytest.raises(KernelUnavailableError, match=words) as caught:
        installed().select(BF16, H100, "fa3_fwd")
    assert caught.value.__cause__ is None


BROKEN = {
    "ImportError": ImportError("undefined symbol: torch_dtype_float8_e8m0fnu\nand more"),
    "OSError": OSError("libcudart.so.13: cannot open shared object file"),
    "RuntimeError": RuntimeError("Only a single TORCH_LIBRARY can be used"),
    "AttributeError": AttributeError("module has no attribute flash_attn_varlen_func"),
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_a_broken_wheel_is_a_reason_and_the_cause_of_the_error(kind):
    error, loads = BROKEN[kind], []

    def load():
        loads.append(1)
        raise error

    selector = Selector(
        replace(p, load=load, modules=()) if p.name == "flash_attn_3" else p for p in PROVIDERS
    )
    words = f'"flash_attn_3" is installed but fails to load: {kind}: '
    for _ in range(2):
        with pytest.raises(KernelUnavailableError, match=words) as caught:
            selector.select(BF16, H100, "flash_attn_3")
        assert caught.value.__cause__ is error
        assert "\n" not in caught.value.summary
    with pytest.raises(KernelUnavailableError, match="float32") as caught:
        selector.select(BF16._replace(dtype=torch.float32), H100, "auto")
    assert f"  flash_attn_3: installed but fails to load: {kind}: " in str(caught.value)
    row = selector.available(H100)[0]
    assert not row.accepted
    assert row.reasons[0].startswith(f"installed but fails to load: {kind}")
    assert loads == [1]


def test_an_error_is_made_anew_each_time():
    selector, errors = installed(), []
    for _ in range(2):
        with pytest.raises(KernelUnavailableError, match="no kernel") as caught:
            selector.select(BF16._replace(head_dim=8192), H100, "auto")
        errors.append(caught.value)
    assert errors[0] is not errors[1]


def test_seqused_k_is_not_offered_where_it_has_no_backward():
    selector = installed("flash_attn_3")
    assert selector.select(BF16, H100).limits.seqused_k
    assert not selector.select(BF16._replace(backward=True), H100).limits.seqused_k
    assert selector.select(BF16._replace(backward=True), CPU).limits.seqused_k
    limits = Limits(archs=("any",), backward=True, seqused_k_backward=False)
    reasons = rejection_reasons(limits, H100, BF16._replace(backward=True, seqused_k=True))
    assert reasons == ["no backward with seqused_k"]


ARCHS = {
    ("sm80", (8, 0)): True,
    ("sm80", (8, 9)): True,
    ("sm86", (8, 0)): False,
    ("sm80", (9, 0)): False,
    ("sm90a", (9, 0)): True,
    ("sm90a", (9, 1)): False,
    ("sm100", (10, 3)): True,
    ("sm90a", (10, 0)): False,
    ("sm120", (12, 0)): True,
    ("sm100", (12, 0)): False,
    ("sm80", None): False,
    ("any", None): True,
}


@pytest.mark.parametrize(("arch", "capability"), list(ARCHS))
def test_machine_code_runs_within_its_major_version_only(arch, capability):
    reasons = rejection_reasons(Limits((arch,)), Machine("cuda", capability), None)
    assert (not reasons) == ARCHS[arch, capability]


def test_flags_take_away_what_was_left_out():
    assert limits_from({}) == FULL_BUILD
    tokenspeed = LIMITS["tokenspeed"]
    assert (tokenspeed.archs, tokenspeed.softcap, tokenspeed.window) == (("sm90a",), False, True)
    assert tokenspeed.dtypes == HALF | FLOAT8
    fa3_fwd = LIMITS["fa3_fwd"]
    assert (fa3_fwd.archs, fa3_fwd.softcap, fa3_fwd.window) == (("sm80", "sm90a"), True, False)
    assert torch.float16 not in fa3_fwd.dtypes
    assert (tokenspeed.page_table, fa3_fwd.page_table) == (True, False)
    assert limits_from(flags(["FP8"])).dtypes == HALF
    small = limits_from(flags(["HDIM256", "HDIM192", "VARLEN", "APPENDKV"]))
    assert (small.max_head_dim, small.varlen, small.seqused_k, small.kvcache) == (
        128,
        False,
        False,
        False,
    )


def test_a_function_is_its_own_kernel():
    def mine(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
        return q

    selector = installed()
    kernel = selector.select(BF16, H100, mine)
    assert kernel.name == "mine"
    assert selector.select(BF16, H100, mine) is kernel
    with pytest.raises(
        KernelUnavailableError, match="kernel mine cannot serve: built without soft"
    ):
        selector.select(BF16._replace(softcap=True), H100, mine)


def test_few_functions_are_kept():
    def make():
        return lambda q, k, v: q

    selector = installed()
    kernels = [make() for _ in range(CALLABLES_KEPT + 3)]
    for kernel in kernels:
        selector.select(BF16._replace(varlen=False), CPU, kernel)
    assert len(selector._callables) == CALLABLES_KEPT


def test_a_bound_method_is_wrapped_once_for_each_object():
    class Owner:
        def attend(self, q, k, v):
            return q

    selector, dense = installed(), BF16._replace(varlen=False)
    one, other = Owner(), Owner()
    assert selector.select(dense, CPU, one.attend) is selector.select(dense, CPU, one.attend)
    assert selector.select(dense, CPU, one.attend) is not selector.select(dense, CPU, other.attend)


def test_a_choice_is_checked_before_any_call():
    selector = installed("fa3_fwd")
    for choice in ("auto", "fa3_fwd", "reference", lambda q, k, v: q):
        selector.check_choice(choice)
    with pytest.raises(KernelUnavailableError, match="not installed"):
        selector.check_choice("flash_attn_3")
    with pytest.raises(KernelUnavailableError, match="no kernel is called"):
        selector.check_choice("nonsense")
    with pytest.raises(InputError, match="must be a name or a function; got 3"):
        selector.check_choice(3)


def test_a_choice_is_made_once(monkeypatch):
    selector = installed("flash_attn_3")
    chosen = selector.select(BF16, H100, "auto")
    monkeypatch.setattr(selection, "rejection_reasons", None)
    assert selector.select(BF16, H100, "auto") is chosen
    with pytest.raises(TypeError, match="not callable"):
        selector.select(FP16, H100, "auto")


def test_rows_print_as_a_table():
    table = installed("fa3_fwd").available(A100)
    assert [row.name for row in table] == [p.name for p in PROVIDERS]
    assert [row.name for row in table if row.accepted] == ["fa3_fwd", "torch_varlen", "reference"]
    head, *lines = str(table).splitlines()
    assert head.startswith("kernel        usable  version  why not, or how `out` is served")
    by_name = {line.split()[0]: line for line in lines}
    assert by_name["flash_attn_3"].split(maxsplit=2)[2] == (
        "not installed (pip install tokenspeed-fa3)"
    )
    assert by_name["fa3_fwd"].split(maxsplit=3) == ["fa3_fwd", "yes", "1.0", "out: native"]
    assert len({line.index(" yes ") for line in lines if " yes " in line}) == 1
    assert "fa3_fwd yes 1.0 out: native" in map(str, table)


def test_this_machine_has_the_reference_at_least():
    rows = {row.name: row for row in available_kernels("cpu")}
    assert rows["reference"].accepted
    assert rows["reference"].out == "copy"
    in_torch = find_spec("torch.nn.attention.varlen") is not None
    reason = "needs a CUDA device" if in_torch else "not installed"
    assert rows["torch_varlen"].reasons == (reason,)
    assert [row.name for row in available_kernels()] == [p.name for p in PROVIDERS]


@pytest.mark.parametrize("name", [p.name for p in PROVIDERS])
def test_every_provider_says_what_to_type(name):
    provider = next(p for p in PROVIDERS if p.name == name)
    assert provider.install
    assert isinstance(provider, Provider)


def test_importing_providers_imports_no_kernel_no_diffusers_and_touches_no_gpu():
    code = """
import sys, torch
torch.cuda._lazy_init = lambda: sys.exit("touched the GPU")
import diffusers_fa3.kernels as providers
providers.available_kernels("cpu")
heavy = {"vllm", "kernels", "sgl_kernel", "flash_attn", "flash_attn_interface", "diffusers"}
sys.exit(", ".join(heavy & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_select_is_the_selector_of_the_real_providers():
    assert of_this_machine.select(BF16, CPU, "auto").name == "reference"
