"""`diffusers-fa3 info`: real output on this machine, made-up machines, and real faults."""

from __future__ import annotations

import argparse
import doctest
import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from command_line import exit_status
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from torch.nn import functional
from zoo import CASES

from diffusers_fa3 import available_kernels
from diffusers_fa3.errors import InputError
from diffusers_fa3.kernels import PROVIDERS
from diffusers_fa3.kernels.contract import Machine, Provider
from diffusers_fa3.kernels.providers import reference
from diffusers_fa3.layers.find import attention_layers
from diffusers_fa3.tools import cli
from diffusers_fa3.tools.info import choices, machine_report
from diffusers_fa3.tools.info.advice import advise
from diffusers_fa3.tools.info.builds import Build, KernelFacts, build_of, read_kernels
from diffusers_fa3.tools.info.choices import DTYPES, HEAD_DIMS, read_choices
from diffusers_fa3.tools.info.command import add_command
from diffusers_fa3.tools.info.conflicts import (
    find_conflicts,
    loaded_only,
    modules_with_two_owners,
    namespace_taken,
)
from diffusers_fa3.tools.info.layers import group_layers, head_size, masks_read
from diffusers_fa3.tools.info.machine import (
    GPU,
    MachineFacts,
    driver_in,
    read_facts,
)
from diffusers_fa3.tools.info.model import read_model
from diffusers_fa3.tools.info.patches import patched_in_diffusers
from diffusers_fa3.tools.info.probe import Probe, Step, probe_kernels
from diffusers_fa3.tools.info.report import MachineReport, of_probes, with_probes
from diffusers_fa3.tools.info.show import plain
from diffusers_fa3.tools.info.wheels import FROM_SOURCE, WHEELS, fitting

PAGE = Path(__file__).parents[1] / "docs" / "info.md"
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without")


@pytest.fixture(autouse=True)
def own_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command by itself, as `diffusers-fa3` has it."""

    def parser() -> argparse.ArgumentParser:
        whole = argparse.ArgumentParser("diffusers-fa3")
        add_command(whole.add_subparsers(required=True, metavar="command"))
        return whole

    monkeypatch.setattr(cli, "_parser", parser)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and a pipeline, as diffusers saves them."""
    root = tmp_path_factory.mktemp("saved")
    tiny.flux().save_pretrained(root / "model")
    tiny.controlled_pipeline().save_pretrained(root / "pipeline")
    tiny.vae().save_pretrained(root / "vae")
    return {name: root / name for name in ("model", "pipeline", "vae")}


# --- this machine --------------------------------------------------------------------------------


def test_every_kernel_is_judged_as_available_kernels_does() -> None:
    report = machine_report()
    said = [(row.name, row.accepted, row.reasons) for row in available_kernels()]
    assert [(k.name, k.accepted, k.reasons) for k in report.kernels] == said
    assert all(kernel.accepted or kernel.reasons for kernel in report.kernels)
    (plain_torch,) = [kernel for kernel in report.kernels if kernel.name == "reference"]
    assert plain_torch.build == build_of(reference.load())
    assert [name for name, _ in plain_torch.distributions] == ["torch"]


def test_every_kind_of_call_has_a_choice() -> None:
    made = read_choices(torch.device("cpu"))
    assert len(made) == len(DTYPES) * len(HEAD_DIMS) * 4 == len({*made})
    assert {choice.kernel for choice in made} == {"reference"}


def test_calls_that_no_kernel_takes_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "read_machine", lambda device: Machine("cuda", (7, 5)))
    made = read_choices(torch.device("cuda"), (64,))
    assert {choice.kernel for choice in made} == {""}
    assert "no kernel serves bfloat16 at head size 64 on a cuda device" in made[0].reason
    shown = plain(replace(machine_report(), choices=made))
    assert re.search(r"fp32 +all +64 +none: PyTorch's attention", shown)


def test_head_sizes_and_calls_with_one_answer_are_one_row() -> None:
    def kernel_of(choice: choices.Choice) -> str:
        if choice.training:
            return "torch_varlen"
        return "flash_attn_4" if choice.head_dim <= 128 else "torch_varlen"

    made = [replace(c, kernel=kernel_of(c)) for c in read_choices(torch.device("cpu"))]
    shown = plain(replace(machine_report(), choices=tuple(made)))
    for row in (
        "bf16 +forward and forward, masked +40 to 128 +flash_attn_4",
        "bf16 +forward and forward, masked +160 to 256 +torch_varlen",
        "bf16 +training and training, masked +40 to 256 +torch_varlen",
    ):
        assert re.search(row, shown), row


@WITHOUT_GPU
def test_the_command_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("info") == 0
    said = capsys.readouterr().out
    for words in (
        f"torch          {torch.__version__}",
        "none that torch can use",
        "FlashAttention-3 needs a Hopper GPU",
        "bf16   all    40 to 256   reference",
        "\nconflicts\n",
    ):
        assert words in said
    assert all(provider.name in said for provider in PROVIDERS)


def test_without_rich_the_tables_are_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert exit_status("info") == 0
    without = capsys.readouterr().out
    assert without == f"{machine_report()}\n"


def test_on_a_terminal_rich_shows_every_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    assert exit_status("info") == 0
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for words in ("machine", "kernels", 'what "auto" takes', "reference", "conflicts"):
        assert words in said


# --- JSON ----------------------------------------------------------------------------------------


def documented() -> dict[str, set[str]]:
    """The keys of each object, as the page lists them."""
    parts = re.split(r"^### `(.*)`$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {
        name: {*re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)}
        for name, table in zip(parts[::2], parts[1::2], strict=True)
    }


def objects(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """One object of every kind in a report."""
    component = report["model"]["components"][0]
    return {
        "report": report,
        "machine": report["machine"],
        "gpus[]": report["machine"]["gpus"][0],
        "kernels[]": report["kernels"][0],
        "build": next(k["build"] for k in report["kernels"] if k["build"]),
        "choices[]": report["choices"][0],
        "advice[]": report["advice"][0],
        "conflicts[]": report["conflicts"][0],
        "probes[]": report["probes"][0],
        "steps[]": report["probes"][0]["steps"][0],
        "model": report["model"],
        "components[]": component,
        "known": component["pack_queries"],
        "layers[]": component["layers"][0],
    }


def test_json_has_the_keys_that_the_page_lists(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "scaled_dot_product_attention", torch.matmul.__call__)
    report = machine_report(folders["model"])
    probe = Probe("reference", (Step("load", "ok"),))
    full = replace(report, machine=hopper(), probes=(probe,)).to_dict()
    found = {name: {*content} for name, content in objects(full).items()}
    assert found == documented()
    assert full["schema"] == 1
    kinds = re.search(r"^Kinds: (.*?)\n\n", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert kinds
    assert f"`{full['conflicts'][0]['kind']}`" in kinds.group(1)


def test_json_is_alone_on_standard_output_and_round_trips(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("info", str(folders["pipeline"]), "--json") == 0
    read = json.loads(capsys.readouterr().out)
    assert read == json.loads(json.dumps(read))
    assert read == machine_report(folders["pipeline"]).to_dict()
    assert [kernel["name"] for kernel in read["kernels"]] == [p.name for p in PROVIDERS]
    assert read["probes"] is None


def test_the_page_names_every_kind_of_conflict_and_outcome() -> None:
    text = PAGE.read_text()
    for kind in ("sdpa", "torch_impl", "backend", "distributions", "namespace", "patch", "loaded"):
        assert f"`{kind}`" in text
    for outcome in ("ok", "skipped", "failed", "wrong", "ended", "timeout"):
        assert f"`{outcome}`" in text


# --- advice for machines that are made up --------------------------------------------------------


def machine(**changed: Any) -> MachineFacts:
    facts = MachineFacts(
        platform="Linux x86_64",
        libc="glibc 2.35",
        python="3.12.3",
        torch="2.13.0+cu130",
        cuda="13.0",
        rocm="",
        cxx11_abi=True,
        cudnn=91900,
        driver="580.65.06",
    )
    return replace(facts, **changed)


def hopper(**changed: Any) -> MachineFacts:
    return machine(gpus=(GPU("NVIDIA H100 80GB HBM3", (9, 0), 79.1),), **changed)


def ampere(**changed: Any) -> MachineFacts:
    return machine(gpus=(GPU("NVIDIA A100-SXM4-80GB", (8, 0), 79.3),), **changed)


HALF = ("bfloat16", "float16")


def build(dtypes: tuple[str, ...] = HALF, backward: bool = False) -> Build:
    return replace(build_of(reference.load()), dtypes=dtypes, backward=backward)


def kernel(name: str, made: Build | None = None, *reasons: str) -> KernelFacts:
    """An accepted kernel; with reasons, a rejected one that is installed."""
    return KernelFacts(name, not reasons, reasons, True, "", "", "", build=made)


TORCH_VARLEN = kernel("torch_varlen", build(backward=True))
REFERENCE = kernel("reference", build(backward=True))


def said(facts: MachineFacts, *kernels: KernelFacts) -> tuple[str, list[str]]:
    """All words of the advice, and its commands."""
    advice = advise(facts, (*kernels, REFERENCE))
    return " ".join(a.text for a in advice), [a.command for a in advice if a.command]


@pytest.mark.parametrize(
    ("torch_release", "cuda", "first"),
    [
        ("2.13.0+cu130", "13.0", "tokenspeed-fa3"),
        ("2.9.1+cu130", "13.0", "tokenspeed-fa3"),
        ("2.10.0+cu128", "12.8", "fa3-fwd==0.0.2"),
        ("2.9.1+cu128", "12.8", "fa3-fwd==0.0.1"),
    ],
)
def test_a_hopper_gpu_without_a_kernel_gets_the_wheel_that_fits(
    torch_release: str, cuda: str, first: str
) -> None:
    words, commands = said(hopper(torch=torch_release, cuda=cuda), TORCH_VARLEN)
    assert commands == [f"pip install '{first}'"]
    assert f"{first} fits this machine" in words


def test_a_wheel_without_a_stable_abi_fits_one_torch_only() -> None:
    fits = {wheel.requirement for wheel in fitting(hopper(torch="2.14.1+cu130"))}
    assert "sglang-kernel==0.4.10" in fits
    (exact,) = [wheel for wheel in WHEELS if wheel.requirement == "sglang-kernel==0.4.10"]
    assert exact.why_not(hopper()) == "needs torch 2.14.1; got 2.13.0+cu130"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"platform": "Linux aarch64"}, "is for Linux x86_64; this is Linux aarch64"),
        ({"torch": "2.8.0+cu128", "cuda": "12.8"}, "needs torch 2.9 or newer; got 2.8.0"),
    ],
)
def test_where_no_wheel_fits_every_reason_is_given(changed: dict[str, Any], why: str) -> None:
    words, commands = said(hopper(**changed))
    assert why in words
    assert commands == [FROM_SOURCE]


def test_what_a_hopper_build_lacks_is_told() -> None:
    words, commands = said(hopper(), kernel("fa3_fwd", build(("bfloat16",))), TORCH_VARLEN)
    assert "FlashAttention-3 serves here: fa3_fwd" in words
    assert "takes no fp16" in words
    assert "training takes torch_varlen" in words
    assert commands == ["pip install tokenspeed-fa3", FROM_SOURCE]
    words, commands = said(hopper(), kernel("flash_attn_3", build(backward=True)))
    assert commands == []
    words, _ = said(hopper(), kernel("flash_attn_3", build()))
    assert "training takes the default attention" in words  # not the reference


def test_other_gpus_are_told_what_serves_there() -> None:
    words, commands = said(ampere(), TORCH_VARLEN)
    assert "FlashAttention-3 is made for a Hopper GPU" in words
    assert "compute capability 8.0. Here torch_varlen serves" in words
    assert commands == []
    words, commands = said(ampere(torch="2.10.0+cu128", cuda="12.8"))
    assert "Here PyTorch's attention serves" in words
    assert commands == ["pip install 'torch>=2.12'"]
    blackwell = machine(gpus=(GPU("NVIDIA B200", (10, 0), 178.0),))
    assert said(blackwell, TORCH_VARLEN)[1] == ["pip install flash-attn-4"]
    assert said(blackwell, kernel("flash_attn_4", build()))[1] == []
    words, commands = said(machine(gpus=(GPU("Tesla T4", (7, 5), 14.6),)))
    assert "before compute capability 8.0" in words
    assert commands == []


def test_without_a_gpu_the_reason_is_looked_for() -> None:
    words, commands = said(machine(cuda="", torch="2.13.0+cpu", driver=""))
    assert "needs a Hopper GPU" in words
    assert '"auto" takes the reference' in words
    assert commands == []
    _, (command,) = said(machine(cuda="", torch="2.13.0+cpu"))
    assert command.endswith("https://download.pytorch.org/whl/cu130")
    _, (command,) = said(machine(cuda="", torch="2.13.0+cpu", driver="535.104.05"))
    assert command.endswith("https://download.pytorch.org/whl/cu126")
    assert said(machine())[1] == ["nvidia-smi"]
    assert "ROCm 6.4" in said(machine(cuda="", rocm="6.4"))[0]


@pytest.mark.parametrize(
    ("name", "error", "means", "command"),
    [
        (
            "fa3_fwd",
            "ImportError: undefined symbol: torch_dtype_float8_e8m0fnu",
            "needs torch 2.11 or newer; got 2.13.0+cu130",
            "'fa3-fwd==0.0.3'",
        ),
        (
            "flash_attn_3",
            "ImportError: libcudart.so.12: cannot open shared object file",
            "another CUDA than torch, which is built for CUDA 13.0",
            "'tokenspeed-fa3'",
        ),
        (
            "flash_attn_3",
            "RuntimeError: Only a single TORCH_LIBRARY can be used to register",
            "only one can load",
            "'tokenspeed-fa3'",
        ),
    ],
)
def test_what_a_failure_to_load_means_is_told(
    name: str, error: str, means: str, command: str
) -> None:
    broken = kernel(name, None, f"installed but fails to load: {error}")
    words, commands = said(hopper(), broken)
    assert f"{name} fails to load: " in words
    assert means in words
    assert commands[-1].endswith(command)


def test_the_driver_is_read_of_either_text() -> None:
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build",
        "535.104.05\n",
    ):
        assert driver_in(text) == "535.104.05"
    assert driver_in("NVIDIA-SMI has failed") == ""


# --- conflicts -----------------------------------------------------------------------------------


def kinds() -> dict[str, list[str]]:
    """The texts of each kind of conflict; other tests of this process may have loaded packages."""
    found: dict[str, list[str]] = {}
    for conflict in find_conflicts():
        found.setdefault(conflict.kind, []).append(conflict.text)
    return found


NOTHING = """
import diffusers, pkgutil, importlib
import diffusers.models as models
for part in ("transformers", "unets", "controlnets", "autoencoders"):
    package = importlib.import_module(f"diffusers.models.{part}")
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if "flax" not in module.name:
            importlib.import_module(module.name)
from diffusers_fa3 import register
from diffusers_fa3.tools.info.conflicts import find_conflicts
register()
print(find_conflicts())
"""


def test_all_models_of_diffusers_and_our_own_patches_are_no_conflict() -> None:
    done = subprocess.run([sys.executable, "-c", NOTHING], capture_output=True, text=True)
    assert done.stdout == "()\n", done.stdout + done.stderr


@pytest.mark.slow
def test_a_replaced_sdpa_is_seen_in_a_process_that_replaces_it() -> None:
    program = """
from torch.nn import functional as F
def sageattn(*args, **kwargs): ...
F.scaled_dot_product_attention = sageattn
from diffusers_fa3.tools.info import choices, machine_report
print(machine_report())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "F.scaled_dot_product_attention is __main__.sageattn, not PyTorch's" in done.stdout


def test_a_backend_of_the_whole_process_is_seen() -> None:
    with attention_backend("_native_math"):
        assert '"_native_math" for the whole process' in kinds()["backend"][0]


def module_with(monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> ModuleType:
    module = ModuleType(name)
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_a_patched_method_is_seen_even_if_wraps_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_with(
        monkeypatch,
        "xfuser",
        "import functools\n"
        "def around(forward):\n"
        "    @functools.wraps(forward)\n"
        "    def call(*args, **kwargs): return forward(*args, **kwargs)\n"
        "    return call\n",
    )
    forward = FluxTransformer2DModel.forward
    monkeypatch.setattr(FluxTransformer2DModel, "forward", module.around(forward))
    assert any(text.endswith("own: FluxTransformer2DModel.forward") for text in kinds()["patch"])
    assert not any("xDiT" in text for text in kinds().get("loaded", ()))
    monkeypatch.undo()
    assert "xfuser" not in patched_in_diffusers()


def test_a_package_that_is_only_loaded_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    module_with(monkeypatch, "para_attn", "")
    (text,) = (text for text in kinds()["loaded"] if text.startswith("ParaAttention"))
    assert "is loaded; no function of PyTorch or diffusers" in text
    assert [*loaded_only(["para_attn"], ["para_attn"])] == []


def distribution(folder: Path, name: str, *files: str) -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()


def test_two_distributions_with_the_same_files_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "tokenspeed-fa3", "flash_attn_interface.py")
    distribution(tmp_path, "flash-attn-3", "flash_attn_interface.py")
    distribution(tmp_path, "flash-attn", "flash_attn/__init__.py")
    distribution(tmp_path, "flash-attn-4", "flash_attn/cute.py")  # a folder, but no file, in common
    monkeypatch.syspath_prepend(tmp_path)
    conflicts = (conflict for conflict in find_conflicts() if conflict.kind == "distributions")
    found = {conflict.subject: conflict for conflict in conflicts}
    assert {*found} == {"flash_attn_interface"}
    both = found["flash_attn_interface"]
    assert both.text.startswith("flash-attn-3 and tokenspeed-fa3 both install flash_attn_interface")
    assert both.command == "pip uninstall flash-attn-3 tokenspeed-fa3"
    rows = {row.name: row for row in read_kernels()}
    names = {"flash-attn-3": "1.0", "tokenspeed-fa3": "1.0"}
    assert dict(rows["flash_attn_3"].distributions) == names


def test_one_owner_is_no_conflict() -> None:
    assert [*modules_with_two_owners(["torch"], {"torch": ["torch", "torch"]})] == []


def test_xformers_that_registers_the_same_ops_is_a_conflict() -> None:
    (conflict,) = namespace_taken("0.0.33.post2", True)
    assert "torch.ops.flash_attn_3" in conflict.text
    assert [*namespace_taken("0.0.35", True)] == []
    assert [*namespace_taken("0.0.34", False)] == []
    assert [*namespace_taken("", True)] == []


def test_the_flags_of_a_build_are_read_without_loading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "fa3-fwd", "fa3_fwd_interface.py", "fa3_fwd_config.py")
    flags = {"FLASHATTENTION_DISABLE_FP16": True, "FLASHATTENTION_DISABLE_FP8": False}
    (tmp_path / "fa3_fwd_config.py").write_text(f"CONFIG = {{'build_flags': {flags}}}")
    (tmp_path / "fa3_fwd_interface.py").write_text("raise RuntimeError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fa3_fwd_config", raising=False)
    (row,) = [row for row in read_kernels("cpu") if row.name == "fa3_fwd"]
    monkeypatch.delitem(sys.modules, "fa3_fwd_config")
    assert (row.installed, row.accepted, row.build_flags) == (True, False, flags)
    assert row.disabled == ["FP16"]


# --- probes --------------------------------------------------------------------------------------

FAKES = """
import os, signal, time
from dataclasses import replace
from diffusers_fa3.kernels.providers.reference import load as well

def segfaults(): os.kill(os.getpid(), signal.SIGSEGV)
def leaves(): os._exit(7)
def hangs(): time.sleep(600)
def raises(): raise OSError("libcudart.so.12: cannot open shared object file")
def dies_packed():
    def forward(q, k, v, options, lengths, **kwargs):
        if lengths.cu_seqlens_q is not None:
            os.kill(os.getpid(), signal.SIGABRT)
        return well().forward(q, k, v, options, lengths, **kwargs)
    return replace(well(), forward=forward)
def doubles():
    def forward(*args, **kwargs):
        out, lse = well().forward(*args, **kwargs)
        return out * 2, lse
    return replace(well(), forward=forward)
def elsewhere():
    return replace(well(), limits=replace(well().limits, seqused_k=False))
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Provider]:
    """Providers by the names of their `load` functions, in a module that a child can import."""
    (tmp_path / "fake_kernels.py").write_text(FAKES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fake_kernels", raising=False)
    module = importlib.import_module("fake_kernels")
    names = re.findall(r"^def (\w+)", FAKES, flags=re.MULTILINE)
    return {n: Provider(n, getattr(module, n), "pip install it", cuda=False) for n in names}


@pytest.mark.slow
def test_a_kernel_that_ends_its_process_is_named_and_the_next_one_tried(
    fakes: dict[str, Provider],
) -> None:
    asked = ("segfaults", "leaves", "raises", "dies_packed", "doubles", "elsewhere")
    absent = Provider("absent", fakes["hangs"].load, "", modules=("no_such_module",))
    by_name = replace(fakes["hangs"], on_request="it downloads")
    found = probe_kernels([absent, by_name, *(fakes[name] for name in asked)], timeout_s=300)
    skipped, *probes = found
    assert skipped.steps == (Step("load", "skipped", "only by name, since it downloads"),)
    faults = [(p.kernel, p.fault.step, p.fault.outcome, p.fault.detail) for p in probes if p.fault]
    assert faults[:4] == [
        ("segfaults", "load", "ended", "SIGSEGV"),
        ("leaves", "load", "ended", "exit status 7"),
        ("raises", "load", "failed", "OSError: libcudart.so.12: cannot open shared object file"),
        ("dies_packed", "packed", "ended", "SIGABRT"),
    ]
    assert faults[4][:3] == ("doubles", "dense", "wrong")
    assert len(faults) == 5
    assert [probe.unsafe_to_load for probe in probes] == [True, True, *[False] * 4]
    assert probes[3].build == build_of(reference.load())
    outcomes = {step.step: step.outcome for step in probes[-1].steps}
    assert outcomes == {"load": "ok", "dense": "ok", "packed": "ok", "seqused": "skipped"}


@pytest.mark.slow
def test_a_kernel_that_hangs_is_ended(fakes: dict[str, Provider]) -> None:
    (probe,) = probe_kernels([fakes["hangs"]], timeout_s=10)
    assert probe.fault
    assert probe.fault.outcome == "timeout"
    assert "not done after 10 s" in probe.fault.detail


@pytest.mark.slow
def test_a_kernel_that_ends_its_process_is_not_loaded_by_the_report(
    tmp_path: Path,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    distribution(tmp_path, "tokenspeed-fa3", "flash_attn_interface.py")
    kills = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    (tmp_path / "flash_attn_interface.py").write_text(kills)
    monkeypatch.syspath_prepend(tmp_path)
    assert exit_status("info", str(folders["model"]), "--probe", "--timeout", "300", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["kernels"]}
    reason = "in a process of its own, load: ended, SIGSEGV"
    assert (rows["flash_attn_3"]["accepted"], rows["flash_attn_3"]["reasons"]) == (False, [reason])
    assert rows["reference"]["accepted"]
    assert rows["fa3_fwd"]["reasons"] == ["not installed"]
    assert report["choices"] == []
    assert report["advice"][0]["command"] == "pip uninstall tokenspeed-fa3"
    assert "flash_attn_interface" not in sys.modules


def test_a_probe_adds_to_what_is_known_of_a_kernel() -> None:
    made = build_of(reference.load())
    good = Probe("torch_varlen", (Step("load", "ok"), Step("dense", "skipped", "no GPU")), made)
    bad = Probe("fa3_fwd", (Step("load", "ok"), Step("packed", "ended", "SIGABRT")), made)
    varlen = kernel("torch_varlen", None, "needs a CUDA device")
    known = with_probes((kernel("fa3_fwd", made), varlen), (good, bad))
    assert known[0].reasons == ("in a process of its own, packed: ended, SIGABRT",)
    assert not known[0].accepted
    assert (known[1].build, known[1].reasons) == (made, ("needs a CUDA device",))
    (advice,) = of_probes((good, bad), known)
    assert advice.text.startswith("fa3_fwd ends its process or hangs (packed: SIGABRT)")


def test_probes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    probes = (Probe("fa3_fwd", (Step("load", "ended", "SIGSEGV"),)),)
    shown = plain(replace(machine_report(), probes=probes))
    assert re.search(r"fa3_fwd +load +ended +SIGSEGV", shown)


# --- a model -------------------------------------------------------------------------------------


def test_the_layers_of_a_model_are_told(folders: dict[str, Path]) -> None:
    facts = read_model(folders["model"])
    assert facts.model == "FluxTransformer2DModel"
    (component,) = facts.components
    assert sum(group.count for group in component.layers) == tiny.LAYERS
    double, single = component.layers
    assert (double.layers, double.count) == ("transformer_blocks.*.attn", 2)
    assert (single.layers, single.count) == ("single_transformer_blocks.*.attn", 1)
    assert (double.heads, double.head_dim) == (2, 16)
    assert (double.layer, double.processor) == ("FluxAttention", "FluxAttnProcessor")
    assert double.calls == ("dispatch_attention_fn",)
    assert double.masks == ("attention_mask",)
    assert component.masks == ()
    assert not component.pack_queries.known
    assert "got FluxTransformer2DModel" in component.pack_queries.reason
    assert component.context_parallel.known
    assert component.unswitchable == ""


@WITHOUT_GPU
def test_what_auto_takes_for_a_layer_is_told(folders: dict[str, Path]) -> None:
    (component,) = read_model(folders["model"]).components
    assert {group.auto for group in component.layers} == {"reference"}
    (component,) = read_model(folders["model"], ask=False).components
    assert {group.auto for group in component.layers} == {""}


def test_of_a_pipeline_what_enable_fa3_switches_is_told(folders: dict[str, Path]) -> None:
    facts = read_model(folders["pipeline"])
    assert facts.model == "FluxControlNetPipeline"
    assert sorted(component.name for component in facts.components) == ["controlnet", "transformer"]
    by_name = {component.name: component for component in facts.components}
    assert "FluxControlNetModel" in by_name["controlnet"].context_parallel.reason
    shown = str(replace(machine_report(), model=facts))
    assert "model transformer: FluxTransformer2DModel" in shown
    assert "several GPUs (cp_plan): no: FluxControlNetModel has no plan" in shown


def test_a_component_that_cannot_be_built_is_left_out_with_the_reason(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    index = {"_class_name": "NewPipeline", "transformer": ["diffusers", "NewTransformer"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer").mkdir()
    config = {"_class_name": "NewTransformer", "_diffusers_version": "9.9.0"}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    facts = read_model(tmp_path)
    assert facts.components == ()
    assert (
        "says NewTransformer. Install the release that made it: 9.9.0"
        in dict(facts.skipped)["transformer"]
    )
    assert "transformer is left out" in str(replace(machine_report(), model=facts))


def test_no_weights_are_needed(folders: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((folders["model"] / "config.json").read_text())
    huge = config | {"num_attention_heads": 2048, "attention_head_dim": 128, "num_layers": 40}
    huge["axes_dims_rope"] = [16, 56, 56]
    (tmp_path / "config.json").write_text(json.dumps(huge))
    (component,) = read_model(tmp_path).components
    assert {group.head_dim for group in component.layers} == {128}


def test_a_mask_that_a_processor_takes_and_leaves_unread_does_not_count() -> None:
    def reads(layer: Any, x: Any, attention_mask: Any = None, image_mask: Any = None) -> Any:
        return x if attention_mask is None else [attention_mask for _ in x]

    assert masks_read(reads) == ("attention_mask",)
    assert masks_read(torch.matmul) == ()


@pytest.mark.parametrize("name", ["stable_audio3", "stable_audio3_plain"])
def test_projections_of_more_than_queries_are_not_taken_for_heads(name: str) -> None:
    """Differential attention projects two queries and two keys."""
    zoo = {case.name: case for case in CASES}
    if name not in zoo:
        pytest.skip("this diffusers has no StableAudio 3")
    case = zoo[name]
    groups = group_layers(attention_layers(case.build()))
    assert {group.head_dim for group in groups} == {64}


def test_a_head_size_that_cannot_be_read_is_unknown() -> None:
    assert head_size(torch.nn.Linear(2, 2)) == (None, None)
    layer = torch.nn.Module()
    layer.heads, layer.to_q = 4, torch.nn.Linear(8, 64)
    assert head_size(layer) == (4, 16)


def test_a_model_can_be_packed_as_pads_says(tmp_path: Path) -> None:
    from diffusers import QwenImageTransformer2DModel

    QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 2, 2),
    ).save_config(tmp_path)
    (component,) = read_model(tmp_path).components
    assert (component.pack_queries.known, component.pack_queries.by) == (True, "diffusers_fa3")
    assert "encoder_hidden_states_mask" in component.masks


# --- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["no/such/folder"], "the model is a local folder with a config.json"),
        (["--timeout", "0"], "a number of seconds above 0; got 0"),
        (["--timeout", "soon"], "a number of seconds above 0; got soon"),
        (["--probes-all"], "unrecognized arguments: --probes-all"),
    ],
)
def test_wrong_arguments_are_refused_in_words(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("info", *options) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


def test_a_folder_that_is_no_model_is_refused_in_words(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    facts = read_model(folders["vae"])  # by itself it is a model like any other
    assert facts.model == "AutoencoderKL"
    file = tmp_path / "config.json"
    for content, says in {
        "{": "must be JSON",
        "[]": "must hold a JSON object; got list",
        '{"architectures": ["T5EncoderModel"]}': "is no model of diffusers: its config.json names",
        '{"_class_name": "EulerDiscreteScheduler"}': "says EulerDiscreteScheduler",
        '{"_class_name": "FluxTransformer2DModel", "num_layers": "x"}': (
            "must build from .*json; got TypeError"
        ),
    }.items():
        file.write_text(content)
        with pytest.raises(InputError, match=says):
            read_model(tmp_path)


def test_the_example_in_the_docstring_runs() -> None:
    (shown,) = doctest.DocTestFinder(recurse=False).find(machine_report, globs={})
    assert doctest.DocTestRunner().run(shown).failed == 0


def test_variables_that_are_set_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_FA3_KERNEL", "reference")
    monkeypatch.delenv("DIFFUSERS_FA3_FALLBACK", raising=False)
    report = machine_report()
    assert report.to_dict()["machine"]["variables"] == {"DIFFUSERS_FA3_KERNEL": "reference"}
    assert re.search(r"DIFFUSERS_FA3_KERNEL +reference", str(report))


def test_the_facts_of_this_machine_are_of_this_process() -> None:
    facts = read_facts()
    assert facts.torch == torch.__version__
    assert facts.python == ".".join(map(str, sys.version_info[:3]))
    assert dict(facts.packages)["diffusers"]
    assert facts.torch_release[0] >= 2
    assert isinstance(machine_report(), MachineReport)
