"""In the benchmark of planning, each mask means what its name says. Times are not tested."""

from __future__ import annotations

import sys

import pytest
import torch
from benchmark_planning import MASKS, forms, main, route

ROUTES = {
    "padding": "packed",
    "key_padding": "seqused",
    "causal": "band",
    "window": "band",
    "segments": "packed",
    "frames": "packed",
    "scatter": "none",
}


def test_masks_are_what_they_are_called() -> None:
    for make in MASKS:
        for form, mask in forms(make(256)[None, None], torch.float32):
            assert route(mask) == ROUTES[make.__name__], (make, form)


@pytest.mark.parametrize("flux", [[], ["--flux-layers", "3", "--heads", "2", "--head-dim", "32"]])
def test_a_row_for_every_mask(
    flux: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--lengths", "32", "48", "--rounds", "1", *flux]
    monkeypatch.setattr(sys, "argv", ["benchmark_planning.py", *options])
    main()
    printed = capsys.readouterr().out
    assert all(printed.count(f" {make.__name__} ") == 4 for make in MASKS)
    assert (" forward " in printed) == bool(flux)
    assert f"torch {torch.__version__}" in printed
