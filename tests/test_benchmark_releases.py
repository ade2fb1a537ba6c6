"""The benchmark of two checkouts, on a copy of this one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples" / "benchmark_releases.py"
pytestmark = pytest.mark.slow


def run(before: Path, *options: str) -> subprocess.CompletedProcess[str]:
    small = ("--small", "--device", "cpu", "--kernel", "reference", "--rounds", "3")
    return subprocess.run(
        [sys.executable, PROGRAM, before, *small, "--models", "pixart", *options],
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_each_checkout_is_measured_on_its_own_package(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "diffusers_fa3", tmp_path / "diffusers_fa3")
    entry = tmp_path / "diffusers_fa3" / "layers" / "enable.py"
    entry.write_text(entry.read_text() + "\n\nprint('the other one')\n")
    done = run(tmp_path, "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the other one") == 1
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["model"], row["share"]) for row in rows] == [("pixart", None), ("pixart", 1 / 15)]
    for row in rows:
        assert len(row["before"]["times_ms"]) == len(row["after"]["times_ms"]) == 3
    assert done.stdout.count("\n| pixart |") == 2


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path} has no package diffusers_fa3" in done.stderr
