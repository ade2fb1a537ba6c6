"""Arguments that more than one command takes."""

from __future__ import annotations

import pytest
import torch
from command_line import exit_status


@pytest.mark.parametrize("argv", [("bench", "--small"), ("check", "no/such/folder")])
def test_without_a_gpu_cuda_is_refused_before_anything_is_loaded(
    argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert exit_status(*argv, "--device", "cuda") == 2
    assert "cuda needs a CUDA device, and torch sees none; give" in capsys.readouterr().err
