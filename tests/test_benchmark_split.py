"""The benchmark of split calls runs, and tells of each way. Times are not tested."""

from __future__ import annotations

import sys

import pytest
import torch
from benchmark_split import main

pytestmark = pytest.mark.slow


def test_a_row_for_every_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_split.py", "--rounds", "1"])
    threads = torch.get_num_threads()
    main()
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert all(f" {way} " in printed for way in ("one process", "U2", "R2", "U2R2"))
    assert f"torch {torch.__version__}" in printed
