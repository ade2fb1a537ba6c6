"""The benchmark of whole models, on tiny ones."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import benchmark_models
import pytest
import torch
from published_models import MODELS, Model, build, forward_of, made_shallow, made_small, make_inputs
from releases import QWENIMAGE_MASKS, has, needs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples" / "benchmark_models.py"
IDS = [model.name for model in MODELS]
MEASURED = [m for m in MODELS if m.name != "qwenimage" or has(QWENIMAGE_MASKS[0])]
"""In older releases, Qwen-Image also requires the lengths that its mask already says."""
FULL = {
    "flux": 11.9e9,
    "qwenimage": 20.4e9,
    "chroma": 8.9e9,
    "hunyuanvideo15": 8.3e9,
    "wan": 1.42e9,
    "sd3": 2.24e9,
    "sdxl": 2.57e9,
    "pixart": 0.61e9,
}
"""Parameters of the published models."""
Rows = dict[tuple[str, float | None], dict[str, Any]]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    small = ("--small", "--device", "cpu", "--kernel", "reference", "--rounds", "1")
    return subprocess.run(
        [sys.executable, PROGRAM, *small, *args],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=100,
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    path = tmp_path_factory.mktemp("benchmark") / "rows.json"
    done = run("--markdown", "--json", str(path), "--models", *(model.name for model in MEASURED))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())["rows"]
    assert done.stdout.count("\n| ") == len(found) + 2
    return {(row["model"], row["share"]): row for row in found}


def test_every_model_is_measured_on_every_share_of_text(rows: Rows) -> None:
    assert list(rows) == [(model.name, share) for model in MEASURED for share in model.shares]
    for row in rows.values():
        assert row["failed"] == ""
        assert 0 < row["speedup"] < math.inf
        for forward in (row["default"], row["ours"]):
            assert all(0 < ms < math.inf for ms in (forward["ms"], *forward["times_ms"]))


def test_ours_serves_every_call_and_gives_the_same(rows: Rows) -> None:
    for row in rows.values():
        assert row["fallbacks"] == 0
        assert row["kernels"] == ["reference"]
        assert row["error"] < 1e-2
        assert row["routes"]


def test_padding_in_the_middle_is_packed(rows: Rows) -> None:
    needs(*QWENIMAGE_MASKS)
    assert set(rows["qwenimage", 0.1]["routes"]) == {"packed"}
    assert set(rows["qwenimage", 0.5]["routes"]) == {"packed"}
    assert set(rows["qwenimage", 1.0]["routes"]) == {"dense"}


def test_padding_goes_the_varlen_routes(rows: Rows) -> None:
    assert set(rows["pixart", 20 / 300]["routes"]) == {"dense", "seqused"}
    assert all(set(row["routes"]) == {"dense"} for row in rows.values() if row["share"] is None)


def test_a_mask_is_read_once_in_a_forward(rows: Rows) -> None:
    for row in rows.values():
        waits = {name: row[name]["host_waits"] for name in ("default", "ours")}
        assert waits["ours"] - waits["default"] == row["plans_made"]
        if row["model"] != "hunyuanvideo15":  # it reads masks itself; its refiner has its own
            assert waits["default"] == 0
            assert row["plans_made"] == int(row["share"] is not None)


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_configurations_are_the_published_ones(model: Model) -> None:
    with torch.device("meta"):
        network = model.cls(**model.config)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == pytest.approx(FULL[model.name], rel=0.01)
    assert made_shallow(model, 3).config == model.config | dict.fromkeys(model.depths, 3)
    assert made_shallow(model, 1000).config == model.config


@pytest.mark.parametrize("model", [m for m in MEASURED if m.mask_name], ids=lambda m: m.name)
def test_a_mask_that_is_dropped_would_show(model: Model) -> None:
    small = made_small(model)
    network = build(small, "cpu")
    inputs = make_inputs(small, small.shares[-1], "cpu")
    with torch.no_grad():
        masked = forward_of(network)(inputs)
        unmasked = forward_of(network)(inputs | {small.mask_name: inputs[small.mask_name] | True})
    assert benchmark_models.error_of(unmasked, masked) > 1e-2


def test_a_model_that_fails_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flux, *_, pixart = MODELS
    broken = benchmark_models.replace(flux, cls=lambda **config: 1 / 0)
    path = tmp_path / "rows.json"
    options = ["--small", "--device", "cpu", "--rounds", "1", "--json", str(path)]
    monkeypatch.setattr(benchmark_models, "MODELS", (broken, pixart))
    monkeypatch.setattr(sys, "argv", [PROGRAM.name, *options])
    assert benchmark_models.main() == 1
    first, *others = json.loads(path.read_text())["rows"]
    assert first["failed"] == "ZeroDivisionError: division by zero"
    assert others
    assert all(row["failed"] == "" for row in others)
    assert "ZeroDivisionError" in capsys.readouterr().out
