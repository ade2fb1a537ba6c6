"""Imports go one way, through the rooms and within each; importing loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_fa3
from diffusers_fa3.kernels import PROVIDERS

PACKAGE = Path(diffusers_fa3.__file__).parent
TOP, BOTTOM = "front doors", "what all know"

ROOMS = {
    "tools": ("cli", "bench", "card", "check", "info", "shared_arguments"),
    "layers": (
        "dispatcher",
        "enable",
        "find",
        "coverage_report",
        "pads",
        "block_masks",
        "processor",
        "rebind",
        "names",
        "calls",
        "frame",
        "record",
        "given",
        "host",
    ),
    "parallel": (
        "attend",
        "decide",
        "whole_mask",
        "exchange",
        "home",
        "plans",
        "plans_image",
        "plans_video",
        "model_plan",
    ),
    TOP: (
        "interface_kvcache",
        "interface",
        "interface_checks",
        "call",
        "fastest",
        "attention",
        "inputs",
    ),
    "masks": ("plan_cache", "planning", "packing", "read", "rows", "outer", "meaning"),
    "kernels": (
        "compiled",
        "installed",
        "providers",
        "selection",
        "race",
        "table",
        "public_function",
        "raw_op",
        "build_flags",
        "adapt",
        "contract",
        "out",
        "signature",
    ),
    BOTTOM: ("errors", "lazy", "options"),
}
"""The map of the package. A room imports from the rooms below it, and a file from the files below
it in its room. `masks` and `kernels` do not import each other."""

ORDER = tuple(ROOMS)
KNOW_DIFFUSERS = ("tools", "layers", "parallel")


def files_of(room: str) -> list[tuple[str, Path]]:
    """(name in the map, path) of every Python file of a room, but for the rooms' `__init__`."""
    folder = PACKAGE if room in (TOP, BOTTOM) else PACKAGE / room
    paths = [
        path
        for name in ROOMS[room]
        for path in ([folder / f"{name}.py"] if (folder / f"{name}.py").exists() else [])
        + sorted((folder / name).rglob("*.py"))
    ]
    return [(path.relative_to(folder).parts[0].removesuffix(".py"), path) for path in paths]


FILES = [(room, name, path) for room in ROOMS for name, path in files_of(room)]
INITS = [(room, PACKAGE / room / "__init__.py") for room in ROOMS if (PACKAGE / room).is_dir()]


def imported(path: Path) -> set[tuple[str, str, str]]:
    """(room, file, name) of everything that a file imports from this package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.ImportFrom) or not node.level, "imports are absolute"
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        package, *parts = node.module.split(".")
        if package != "diffusers_fa3":
            continue
        for alias in node.names:
            where = parts or [alias.name]
            if where[0] not in ROOMS:  # a file beside the rooms, or a public name
                room = BOTTOM if where[0] in ROOMS[BOTTOM] else TOP
                found.add((room, where[0], alias.name))
            else:
                inner = where[1] if where[1:] else ""
                is_file = not inner and alias.name in ROOMS[where[0]]
                found.add((where[0], alias.name if is_file else inner, alias.name))
    return found


def test_the_map_names_every_file() -> None:
    mapped = {path for _, _, path in FILES} | {path for _, path in INITS}
    assert mapped | {PACKAGE / "__init__.py"} == set(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize(
    ("room", "name", "path"), FILES, ids=[str(path.relative_to(PACKAGE)) for _, _, path in FILES]
)
def test_a_file_imports_only_from_below_it(room: str, name: str, path: Path) -> None:
    files = ROOMS[room]
    for other, file, what in imported(path):
        if other == room:
            assert file in files[files.index(name) :], f"{what} of {file}"
        else:
            assert ORDER.index(other) > ORDER.index(room), f"{what} of {other}"
            assert {room, other} != {"masks", "kernels"}
            assert not file or other in (TOP, BOTTOM), f"{what}: take it from {other} itself"


def test_the_map_has_no_room_for_what_nobody_needs() -> None:
    """A room's `__init__` exports exactly what other rooms or the public names use."""
    uses = set().union(*(imported(path) for _, _, path in FILES))
    uses |= imported(PACKAGE / "__init__.py")
    for room, init in INITS:
        handed_on = {what for _, file, what in imported(init) if file}
        used = {what for other, file, what in uses if other == room and not file}
        assert handed_on == used, room


@pytest.mark.parametrize(
    ("room", "path"),
    [(room, path) for room, _, path in FILES if room not in KNOW_DIFFUSERS],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_only_layers_parallel_and_tools_know_diffusers(room: str, path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert "diffusers" not in {module.split(".")[0] for module in modules}


LOADED = """
import sys
import diffusers_fa3
{use}
loaded = [name for name in {modules!r} if name in sys.modules]
import torch
print(",".join(loaded), torch.cuda.is_initialized())
"""
KERNELS = tuple(
    module for p in PROVIDERS for module in p.modules if not module.startswith("torch.")
)


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
