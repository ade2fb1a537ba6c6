"""Small example programs: each does what its docstring says, and fails where it has to."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import compile as compiling
import custom_kernel
import lora_training
import numpy as np
import padded_batch
import pytest
import text_to_image
import torch
from custom_kernel import my_attention
from digits_task import MODEL_DIR, draw
from loading import load_pipeline
from pipelines import pixart, wan
from releases import QWENIMAGE_MASKS, needs
from test_examples import run
from torch import Tensor

from diffusers_fa3 import coverage, enable_fa3
from diffusers_fa3.layers.coverage_report import Coverage

pytestmark = pytest.mark.slow

PROGRAMS = (compiling, custom_kernel, lora_training, padded_batch)

RIGHT: dict[str, tuple[str, ...]] = {
    "custom_kernel.py": ("my_attention", "packed 36", "by itself, kernel - default", "pixels"),
    "padded_batch.py": ("packed 36, dense 108", "batch - alone", "seven", "allowed: 1.1e-05"),
    "compile.py": ("packed 36", "compiled graphs", "static 36", "steps: 12, graphs compiled: 1"),
    "lora_training.py": ("packed 36", "loss: default, FA3", "allowed: 3.5e-04"),
}
"""What each program prints without arguments."""

WRONG: list[tuple[str, str, str]] = [
    ("custom_kernel.py", "--broken", "FAILED: more than 1e-05 by itself, or 0.001 in a pixel"),
    ("padded_batch.py", "--no-mask", "FAILED: a prompt gives another picture in the batch"),
]
"""The switches that make a program fail, and the words of that."""

REFUSED: list[tuple[ModuleType, tuple[str, ...], str]] = [
    (custom_kernel, ("--model", "no/such/folder"), "no/such/folder"),
    (padded_batch, ("--model", "no/such/folder"), "no/such/folder"),
    (padded_batch, ("--kernel", "no_such_kernel"), "no kernel is called"),
    (padded_batch, ("--prompt", "seven"), "one prompt makes no batch; give --prompt twice"),
    (compiling, ("--model", "no/such/folder"), "no/such/folder"),
    (compiling, ("--kernel", "no_such_kernel"), "no kernel is called"),
    (compiling, ("--backend", "no_such_one"), "torch.compile has no backend 'no_such_one'"),
    (lora_training, ("--model", "no/such/folder"), "no/such/folder"),
    (lora_training, ("--kernel", "no_such_kernel"), "no kernel is called"),
]
"""Arguments with which a program cannot start, and a part of what it says."""

SHORT = ("--steps", "2")


@pytest.fixture(autouse=True)
def fresh() -> None:
    needs(*QWENIMAGE_MASKS)
    torch._dynamo.reset()


def call(program: ModuleType, *args: str, patch: pytest.MonkeyPatch) -> int:
    """The exit status of a program, run in this process."""
    patch.setattr(sys, "argv", [str(program.__file__), *args])
    return program.main()


def name_of(value: object) -> str | None:
    return value.__name__ if isinstance(value, ModuleType) else None


every_program = pytest.mark.parametrize("program", PROGRAMS, ids=name_of)


@pytest.mark.parametrize("program", RIGHT)
def test_a_program_without_arguments_draws_or_trains_the_digits(program: str) -> None:
    done = run(program)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (*RIGHT[program], "0 on the default attention"):
        assert words in done.stdout
    assert "FAILED" not in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("program", "switch", "words"), WRONG, ids=lambda value: value)
def test_a_program_that_is_told_to_do_wrong_fails(program: str, switch: str, words: str) -> None:
    done = run(program, switch, *SHORT)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("FAILED") == 1
    assert words in done.stdout
    assert "Traceback" not in done.stderr


def test_what_cannot_start_is_refused_by_exit_status_and_in_words() -> None:
    done = run("padded_batch.py", "--prompt", "seven")
    assert done.returncode == 2
    assert done.stderr.startswith("error: one prompt makes no batch")
    assert done.stdout == ""


@pytest.mark.parametrize(("program", "args", "words"), REFUSED, ids=name_of)
def test_arguments_that_cannot_be_are_refused_in_words(
    program: ModuleType,
    args: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(program, *args, patch=monkeypatch) == 2
    assert words in capsys.readouterr().err


@every_program
def test_without_a_gpu_cuda_is_refused(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(program, "--device", "cuda", patch=monkeypatch) == 2
    assert "there is no CUDA device here" in capsys.readouterr().err


@every_program
def test_the_help_says_what_was_not_run(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        call(program, "--help", patch=monkeypatch)
    said = " ".join(capsys.readouterr().out.split())
    assert "Not tested: models other than the digits; --device cuda." in said


def test_the_help_has_the_default_prompts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        call(compiling, "--help", patch=monkeypatch)
    said = " ".join(capsys.readouterr().out.split())
    assert "default: 'seven'; 'a picture of the digit three'" in said


def with_a_fallback(model: Any) -> Coverage:
    first, *rest = coverage(model).rows
    rows = (dataclasses.replace(first, fallbacks={"a reason": 1}), *rest)
    return dataclasses.replace(coverage(model), rows=rows)


@every_program
def test_a_call_on_the_default_attention_fails(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "coverage", with_a_fallback)
    assert call(program, *SHORT, patch=monkeypatch) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 1
    assert "default attention, 1 times: a reason" in printed


def test_a_graph_that_gives_other_pictures_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiling, "largest", lambda a, b: 2e-3)
    assert call(compiling, "--backend", "eager", *SHORT, patch=monkeypatch) == 1
    assert "FAILED: a pixel is further than 0.001" in capsys.readouterr().out


# --- other pipelines -----------------------------------------------------------------------------

OTHER = ("--model", "other", "--prompt", "a cat", "--prompt", "a much longer prompt", *SHORT)


def with_pipeline(pipe: Any, program: ModuleType, *args: str, patch: pytest.MonkeyPatch) -> int:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # as from a folder
    patch.setattr(program, "load_pipeline", lambda *_: pipe)
    return call(program, *OTHER, *args, patch=patch)


@pytest.mark.parametrize(
    "program", [text_to_image, custom_kernel, padded_batch, compiling], ids=name_of
)
def test_a_pipeline_of_videos_is_refused_before_it_runs(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = wan.CASES[0].make()
    monkeypatch.setattr(pipe, "encode_prompt", None)  # an error, if it runs
    assert with_pipeline(pipe, program, patch=monkeypatch) == 2
    assert capsys.readouterr().err.endswith(
        "error: this program draws pictures; got a WanPipeline, which gives frames; "
        "`diffusers-fa3 check` takes it\n"
    )


class Singer:
    """A pipeline whose arguments do not tell that it gives no pictures."""

    def __call__(self, prompt: list[str], **_: object) -> dict[str, object]:
        return {"audios": prompt}


class Painter:
    """A pipeline of Kandinsky 5's kind."""

    def __call__(self, prompt: list[str], **_: object) -> dict[str, object]:
        return {"image": prompt}


def test_pictures_may_have_the_singular_for_a_name() -> None:
    args = argparse.Namespace(prompt=["a cat"], seed=0, steps=1, size=None)
    assert text_to_image.draw(Painter(), args) == ["a cat"]


def test_a_pipeline_that_gave_no_pictures_is_refused() -> None:
    args = argparse.Namespace(prompt=["la"], seed=0, steps=1, size=None)
    with pytest.raises(ValueError, match="draws pictures; got a Singer, which gives audios; "):
        text_to_image.draw(Singer(), args)


def test_a_size_that_a_pipeline_refuses_can_be_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = pixart.CASES[0].make()
    assert with_pipeline(pipe, padded_batch, patch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert "error: Invalid sample size; give another height and width with --size" in said
    assert with_pipeline(pipe, padded_batch, "--size", "8", patch=monkeypatch) == 0


def test_additive_masks_in_a_graph_fail_as_the_page_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = pixart.CASES[0].make()
    backend = ("--backend", "eager", "--size", "8")
    assert with_pipeline(pipe, compiling, *backend, patch=monkeypatch) == 1
    assert compiling.EXPECTED in capsys.readouterr().out
    page = Path(compiling.__file__).parents[1] / "docs" / "limits.md"
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
    assert compiling.EXPECTED.split("#")[1] in anchors


# --- the kernel, and training --------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_kernel_is_exact_and_serves_grouped_heads(heads: int) -> None:
    q, k, v = (torch.randn(2, 12, n, 16, dtype=torch.float64) for n in (4, heads, heads))
    ends = torch.tensor([0, 12, 24], dtype=torch.int32)
    out = my_attention(*(x.flatten(0, 1) for x in (q, k, v)), ends, ends, 12, 12)
    right = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True
    )
    torch.testing.assert_close(out.view_as(q), right.transpose(1, 2))


def test_the_kernel_gives_0_where_a_sequence_has_no_key() -> None:
    q, k, v = torch.randn(3, 4, 2, 8)
    ends = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 2, 4], [0, 0, 4])]
    assert not my_attention(q, k, v, *ends, 2, 4)[:2].any()


class HalfGradient(torch.autograd.Function):
    """The very input, with half of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


def with_wrong_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    times: float = 1.0,
) -> Tensor:
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return times * my_attention(HalfGradient.apply(q), k, v, *lengths, softmax_scale)


@pytest.mark.parametrize("times", [1.0, float("nan")], ids=["wrong", "not finite"])
def test_wrong_gradients_fail(
    times: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = partial(with_wrong_gradients, times=times)
    given = partial(enable_fa3, fallback="error")
    monkeypatch.setattr(lora_training, "enable_fa3", lambda pipe, **_: given(pipe, kernel=kernel))
    assert call(lora_training, *SHORT, patch=monkeypatch) == 1
    printed = capsys.readouterr().out
    assert "FAILED: losses or gradients are not finite, or not those of the default" in printed


def test_training_writes_nothing_without_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(lora_training, *SHORT, patch=monkeypatch) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_saved_lora_is_one_that_diffusers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(lora_training, *SHORT, "--out", str(tmp_path), patch=monkeypatch) == 0
    pipe = load_pipeline(MODEL_DIR)
    pipe.set_progress_bar_config(disable=True)
    before = draw(pipe, ["seven"], seeds=[4], steps=2)
    pipe.load_lora_weights(tmp_path)
    assert np.abs(draw(pipe, ["seven"], seeds=[4], steps=2) - before).max() > 1e-3
