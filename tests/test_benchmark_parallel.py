"""`examples/benchmark_parallel.py` measures tiny models on two CPU processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_parallel import ONE, Way
from releases import QWENIMAGE_MASKS, needs
from test_several_gpus_example import ROOT, torchrun

PROGRAM = ROOT / "examples" / "benchmark_parallel.py"


@pytest.mark.parametrize(
    ("way", "name", "sends"),
    [
        (ONE, "one GPU", 0),
        (Way(2, 1), "U2", 1),
        (Way(1, 2), "R2", 1),
        (Way(4, 1), "U4", 0.75),
        (Way(2, 2), "U2R2", 1),
        (Way(1, 8), "R8", 1.75),
    ],
)
def test_bytes_by_formula_are_those_of_the_documentation(way: Way, name: str, sends: float) -> None:
    assert str(way) == name
    assert way.sends(1000) == 1000 * sends


def test_sizes_that_do_not_divide_are_told() -> None:
    assert Way(2, 1).degrees(True)["ulysses_anything"]
    assert Way(1, 2).degrees(True)["ring_anything"]
    assert Way(2, 2).degrees(False) == {"ulysses_degree": 2, "ring_degree": 2}


@pytest.mark.slow
def test_every_method_is_a_row(tmp_path: Path) -> None:
    needs(*QWENIMAGE_MASKS)
    told = ("--device", "cpu", "--small", "--rounds", "2", "--kernel", "reference")
    which = ("--models", "qwenimage", "hunyuanvideo15", "--shares", "none", "0.1")
    methods = ("--attentions", "native", "ours", "--json", str(tmp_path / "rows.json"))
    said = torchrun(PROGRAM, *told, *which, *methods)
    assert "qwenimage, 10% valid" in said
    rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())["rows"]
    found = {(row["model"], row["share"], row["attention"], row["way"]): row for row in rows}
    assert len(found) == len(rows) == 3 * 6
    for (model, share, attention, way), row in found.items():
        if attention == "native" and way != "one GPU":
            # diffusers has no plan for HunyuanVideo 1.5, and no ring on its native backend.
            assert bool(row["failed"]) == (model == "hunyuanvideo15" or way == "R2")
            continue
        assert not row["failed"]
        assert len(row["times_ms"]) == 2
        if attention == "ours":
            kernel, route, calls = row["calls"].split()
            assert (kernel, route) == ("reference", "dense" if share is None else "packed")
            assert int(calls) >= 2
            assert row["error"] < 2e-2
        if attention == "ours" and way != "one GPU":
            # Beside tokens, masks are sent, and lengths where they do not divide.
            assert row["formula_mb"] <= row["sent_mb"] < row["formula_mb"] + 3e-3
