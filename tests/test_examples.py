"""The example programs, run as programs, do what they say."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import quickstart
from comparison import HEAD, LABEL_WIDTH, MARGIN, Comparison, amplification, compare, write_grid
from digits_task import MODEL_DIR
from PIL import Image
from quickstart import Digits
from releases import QWENIMAGE_MASKS, needs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TEXT_TO_IMAGE = ("text_to_image.py", "--model", str(MODEL_DIR), "--size", "32", "--steps", "4")
TWO_PROMPTS = ("--prompt", "seven", "--prompt", "a picture of the digit three")


def run(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "examples" / program, *args],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        timeout=100,
    )


def panels(path: Path, rows: int) -> list[np.ndarray]:
    """Return the default's, FA3's and the difference's column of a grid, without its labels."""
    sheet = np.asarray(Image.open(path)).astype(int)
    column = (sheet.shape[1] - LABEL_WIDTH) // 3
    size = (sheet.shape[0] - HEAD) // rows - MARGIN
    lefts = [LABEL_WIDTH + i * column for i in range(3)]
    return [
        np.stack([sheet[HEAD + y * (size + MARGIN) :][:size, left:][:, :size] for y in range(rows)])
        for left in lefts
    ]


def assert_same_pictures(path: Path, rows: int) -> None:
    default, fa3, difference = panels(path, rows)
    assert default.max() > 200
    assert default.std() > 50
    assert np.abs(fa3 - default).max() <= 1
    assert difference.shape == default.shape


def test_quickstart_compares_a_masked_batch_and_writes_one_picture(tmp_path: Path) -> None:
    needs(*QWENIMAGE_MASKS)
    out = tmp_path / "grid.png"
    done = run("quickstart.py", "--kernel", "reference", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("reference", "packed", "0 on the default attention", "parity", "ms per step"):
        assert words in done.stdout
    assert str(out) in done.stdout
    assert_same_pictures(out, len(quickstart.PROMPTS))


def test_quickstart_draws_the_prompts_it_is_given(tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    done = run("quickstart.py", "--prompts", "the digit nine", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prompts: 1," in done.stdout
    assert "dense" in done.stdout  # nothing is padded
    assert_same_pictures(out, 1)


def test_text_to_image_runs_a_pipeline_from_a_folder(tmp_path: Path) -> None:
    needs(*QWENIMAGE_MASKS)
    out = tmp_path / "grid.png"
    done = run(*TEXT_TO_IMAGE, *TWO_PROMPTS, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("QwenImagePipeline", "packed", "pixels, FA3 - default", "ms per step"):
        assert words in done.stdout
    assert_same_pictures(out, 2)


@pytest.mark.parametrize(
    "command",
    [("quickstart.py",), (*TEXT_TO_IMAGE, *TWO_PROMPTS)],
    ids=["quickstart", "text_to_image"],
)
def test_an_unknown_kernel_is_refused_in_words(command: tuple[str, ...]) -> None:
    done = run(*command, "--kernel", "no_such_kernel")
    assert done.returncode == 2
    assert "no_such_kernel" in done.stderr
    assert "reference" in done.stderr  # a kernel that there is
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("folder", "words"), [(".", "model_index.json"), ("no/such/folder", "no/such/folder")]
)
def test_a_missing_model_is_refused_in_words(folder: str, words: str, tmp_path: Path) -> None:
    done = run("text_to_image.py", "--model", str(tmp_path / folder), "--prompt", "seven")
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def with_other_pixels(right: Comparison[Digits]) -> Comparison[Digits]:
    fa3 = dataclasses.replace(right.fa3, pixels=right.fa3.pixels + 1e-4)
    return dataclasses.replace(right, fa3=fa3)


def with_a_fallback(right: Comparison[Digits]) -> Comparison[Digits]:
    first, *rest = right.coverage.rows
    rows = (dataclasses.replace(first, fallbacks={"a reason": 1}), *rest)
    return dataclasses.replace(right, coverage=dataclasses.replace(right.coverage, rows=rows))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (with_other_pixels, "FAILED: FA3 is further from float64 than allowed"),
        (with_a_fallback, "FAILED: the default attention served some calls"),
    ],
)
def test_quickstart_fails_if_something_is_wrong(
    spoil: Callable[[Comparison[Digits]], Comparison[Digits]],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        quickstart, "compare", lambda *args, **kwargs: spoil(compare(*args, **kwargs))
    )
    monkeypatch.setattr(
        sys, "argv", ["quickstart.py", "--prompts", "seven", "--out", str(tmp_path / "grid.png")]
    )
    assert quickstart.main() == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 1
    assert words in printed


@pytest.mark.parametrize(
    ("peak", "factor"), [(0.0, 1), (1.0, 1), (0.5, 1), (0.03, 10), (2e-7, 10**6)]
)
def test_a_difference_is_amplified_until_it_shows(peak: float, factor: int) -> None:
    assert amplification(np.array([0.0, peak])) == factor


def test_a_grid_is_enlarged_without_changing_a_pixel(tmp_path: Path) -> None:
    picture = np.linspace(0, 1, 16 * 32 * 3).reshape(1, 16, 32, 3).astype(np.float32)
    write_grid(tmp_path / "grid.png", ["a"], picture, picture, zoom=4)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    shown = sheet[HEAD : HEAD + 64 : 4, LABEL_WIDTH : LABEL_WIDTH + 128 : 4]
    assert np.array_equal(shown, (255 * picture[0]).round().astype(np.uint8))
