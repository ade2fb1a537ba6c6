"""Imports go one way, down DESIGN's list, and importing the package loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_fa3

PACKAGE = Path(diffusers_fa3.__file__).parent
ORDER = (
    "cli",
    "bench",
    "dispatcher",
    "enable",
    "report",
    "pads",
    "processor",
    "rebind",
    "calls",
    "given",
    "host",
    "interface",
    "interface_checks",
    "attention",
    "ops",
    "inputs",
    "plans",
    "packing",
    "masks",
    "rows",
    "outer",
    "meaning",
    "providers",
    "out",
    "signature",
    "errors",
)
"""A file imports from those below it only."""


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers_fa3."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "diffusers_fa3":
            names.update(alias.name for alias in node.names)
    return names


def test_the_order_names_every_file() -> None:
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert files | {"bench", "providers"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_below_it(name: str) -> None:
    path = PACKAGE / name
    files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    below = set(ORDER[ORDER.index(name) :])
    for file in files:
        assert imported(file) <= below, file.name


LOADED = """
import sys
import diffusers_fa3
{use}
loaded = [name for name in {modules!r} if name in sys.modules]
import torch
print(",".join(loaded), torch.cuda.is_initialized())
"""
KERNELS = (
    "flash_attn", "flash_attn_interface", "flash_attn_3", "fa3_fwd_interface", "sgl_kernel",
    "vllm", "kernels", "xformers",
)  # fmt: skip


@pytest.mark.parametrize(
    ("use", "modules"),
    [
        ("", ("diffusers", "transformers", *KERNELS)),
        ("diffusers_fa3.available_kernels()", ("diffusers", "vllm", "kernels")),
        ("diffusers_fa3.enable_fa3", KERNELS),
    ],
    ids=["import", "available_kernels", "enable_fa3"],
)
def test_a_fresh_interpreter_loads_no_more_than_it_needs(
    use: str, modules: tuple[str, ...]
) -> None:
    code = LOADED.format(use=use, modules=modules)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]


def test_every_public_name_is_there_and_has_a_docstring() -> None:
    for name in diffusers_fa3.__all__:
        assert getattr(diffusers_fa3, name).__doc__, name
    assert callable(diffusers_fa3.attention)
    assert callable(diffusers_fa3.coverage)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'enable_'"):
        diffusers_fa3.enable_  # noqa: B018
