"""The benchmark of two checkouts, on a copy of this one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_releases import parse_args

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples" / "benchmark_releases.py"


@pytest.mark.slow
def test_each_checkout_is_measured_on_its_own_package(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "diffusers_fa3", tmp_path / "diffusers_fa3")
    entry = tmp_path / "diffusers_fa3" / "layers" / "enable.py"
    entry.write_text(entry.read_text() + "\n\nprint('the other one')\n")
    small = ("--small", "--device", "cpu", "--kernel", "reference", "--rounds", "3")
    what = (tmp_path, *small, "--models", "pixart", "--json", str(tmp_path / "rows.json"))
    done = subprocess.run(
        [sys.executable, PROGRAM, *what], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the other one") == 1
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["model"], row["share"]) for row in rows] == [("pixart", None), ("pixart", 1 / 15)]
    for row in rows:
        assert len(row["before"]["times_ms"]) == len(row["after"]["times_ms"]) == 3
    assert done.stdout.count("\n| pixart |") == 2


def test_a_folder_without_the_package_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_releases.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        parse_args()
    assert ended.value.code == 2
    assert f"{tmp_path} has no package diffusers_fa3" in capsys.readouterr().err
