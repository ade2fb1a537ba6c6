"""The hub's kernel by the real `kernels` library, on a build made around an installed wheel.

Only the download is left out: LOCAL_KERNELS names a folder in the place of the hub's repository.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F
from zoo import CASES
from zoo.budget import budget, error
from zoo.case import key_mask

from diffusers_fa3 import KernelUnavailableError, attention, coverage, enable_fa3
from diffusers_fa3.kernels.build_flags import limits_from, read_flags
from diffusers_fa3.kernels.contract import Limits
from diffusers_fa3.kernels.installed import kernel_named
from diffusers_fa3.kernels.providers.hub import REPOSITORY, VERSION

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(find_spec("kernels") is None, reason="kernels is not installed"),
]

WHEELS = {"flash_attn_3": "flash_attn_config", "fa3_fwd": "fa3_fwd_config"}
"""Packages that hold a binary `_C`, whose op has the package's name; and their modules of flags."""

SOURCES = {
    "__init__.py": "from . import flash_attn_interface\n",
    "flash_attn_interface.py": "from ._ops import ops as flash_attn_3_cuda\n",
    "_ops.py": "import torch\n\nfrom . import _C\n\nops = torch.ops.{package}\n",
}
"""What our loader reads of a build of the hub."""

METADATA = {
    "id": "_flash_attn3_by_hand",
    "name": "flash-attn3",
    "version": VERSION,
    "license": "BSD-3-Clause",
    "python-depends": [],
    "backend": {"type": "cuda", "archs": ["8.0", "9.0a"]},
}


def file_of(module: str) -> Path | None:
    """Where a module lies, without importing it; its package may be missing."""
    package = module.rpartition(".")[0]
    spec = find_spec(module) if not package or find_spec(package) else None
    return Path(spec.origin) if spec and spec.origin else None


def publish(folder: Path, package: str, binary: Path, flags: Path, abi: str = "29") -> None:
    """Lay out a repository of one build, for this machine's CUDA and torch's stable ABI."""
    cuda = "cu" + torch.version.cuda.replace(".", "") if torch.version.cuda else "cpu"
    variant = folder / "build" / f"torch-stable-abi{abi}-{cuda}-{platform.machine()}-linux"
    variant.mkdir(parents=True)
    for name, text in SOURCES.items():
        (variant / name).write_text(text.format(package=package))
    (variant / "flash_attn_config.py").write_text(flags.read_text())
    (variant / "metadata.json").write_text(json.dumps(METADATA))
    (variant / binary.name).symlink_to(binary)


class Found(NamedTuple):
    """What a process found that loaded the kernel "hub"."""

    file: str
    """Of the build's module."""
    limits: Limits
    modules_of_wheels: set[str]
    """That were imported all the same."""
    errors: list[tuple[float, float]]
    """Of attention calls and of a model, each with what is allowed."""
    kernels: set[str]
    """That served the model's calls."""


def use_the_hub(device: str) -> Found:
    """Attention and a model on the kernel "hub": in a process of its own."""
    errors = []
    q, k, v = torch.randn(3, 2, 200, 4, 128, device=device).bfloat16()
    for layout in ("none", "ragged", "gap"):
        mask = key_mask(layout, 200)
        mask = None if mask is None else mask.to(device)
        out = torch.full_like(q, torch.nan)
        got = attention(q, k, v, mask, kernel="hub", out=out)
        seen = None if mask is None else mask[:, None, None]
        default, exact = (
            F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), attn_mask=seen)
            for qkv in ((q, k, v), (q.double(), k.double(), v.double()))
        )
        assert got is out
        errors.append((error(out, exact.transpose(1, 2)), budget(default, exact)))

    case = next(case for case in CASES if case.name == "qwenimage")
    default = case.run(case.build(torch.bfloat16).to(device), "gap").cpu()
    model = case.build(torch.bfloat16).to(device)
    enable_fa3(model, kernel="hub", fallback="error")
    exact = case.exact("gap")
    errors.append((error(case.run(model, "gap").cpu(), exact), budget(default, exact)))

    (loaded,) = sys.modules["kernels"].get_loaded_kernels()
    of_wheels = {"flash_attn_interface", "fa3_fwd_interface", *(f"{name}._C" for name in WHEELS)}
    return Found(
        loaded.module.__file__,
        kernel_named("hub").limits,
        of_wheels & sys.modules.keys(),
        errors,
        {row.kernel for row in coverage(model).rows if row.calls},
    )


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns in a new interpreter, or raises there."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@pytest.fixture(params=WHEELS)
def wheel(request: pytest.FixtureRequest) -> tuple[str, Path, Path]:
    """A package that is installed, its binary and its flags."""
    binary, flags = file_of(f"{request.param}._C"), file_of(WHEELS[request.param])
    if binary is None or flags is None:
        pytest.skip(f"no wheel with {request.param} is installed")
    return request.param, binary, flags


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the hub's repository in processes that are started from here."""
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPOSITORY}={tmp_path}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_the_hub_serves_from_a_build_of_its_own(wheel, repository: Path) -> None:
    publish(repository, *wheel)
    found = in_a_process(use_the_hub, "cuda")
    assert Path(found.file).is_relative_to(repository)
    assert not found.modules_of_wheels
    assert found.limits == limits_from(read_flags(WHEELS[wheel[0]]))
    assert all(got <= allowed for got, allowed in found.errors), found.errors
    assert found.kernels == {"hub"}


def test_a_build_for_another_torch_is_refused_in_the_words_of_the_library(
    wheel, repository: Path
) -> None:
    publish(repository, *wheel, abi="999")
    with pytest.raises(KernelUnavailableError, match="Cannot find a build variant"):
        in_a_process(use_the_hub, "cuda")
