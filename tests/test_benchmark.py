"""The benchmark measures every method on every call, and judges their results. No times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case
from benchmark import WRONG_FROM, error_of
from benchmark_report import METHODS
from PIL import Image
from releases import needs
from rivals import Method, backend_in, host_syncs
from torch.nn import functional

ROOT = Path(__file__).parents[1]
NAMES = [case.name for case in CASES]
GAPS = {case.name for case in CASES if case.gap}
PATTERNS = {case.name for case in CASES if case.pattern}
MASKED = {case.name for case in CASES if case.shares[-1] is not None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one small run of all cases has put what it writes."""
    needs("0.37", "expects two results of FlashAttention-3, which gives one")
    folder = tmp_path_factory.mktemp("benchmark")
    files = ("--json", str(folder / "all.json"), "--plot", str(folder / "all.png"))
    options = ("--small", "--rounds", "2", "--kernel", "reference", "--device", "cpu")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "benchmark.py", *options, *files, "--cases", *NAMES],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all.json").read_text())


def timings(report: dict[str, Any], method: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return each row with its timing of one method."""
    return [(row, row["methods"][method]) for row in report["rows"]]


def test_every_case_share_and_dtype_has_a_row(report: dict[str, Any]) -> None:
    rows = [(row["case"], row["dtype"], row["share"]) for row in report["rows"]]
    assert rows == [
        (case.name, dtype, share)
        for case in CASES
        for dtype in ("float32", "bfloat16")
        for share in case.shares
    ]
    assert not report["skipped"]


def test_every_method_is_timed_or_refuses_in_words(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert tuple(row["methods"]) == METHODS
        assert row["input_sets"] >= 2
        for timing in row["methods"].values():
            if timing["refused"]:
                assert len(timing["refused"].split()) > 2
                assert timing["ms"] is None
            else:
                assert len(timing["times_ms"]) == 2
                assert timing["tflops"] > 0


@pytest.mark.parametrize("method", ["default", "ours", "ours+plan", "bare"])
def test_these_methods_take_every_call_and_give_one_result(
    report: dict[str, Any], method: str
) -> None:
    for row, timing in timings(report, method):
        assert not timing["refused"]
        assert timing["error"] < (2e-6 if row["dtype"] == "float32" else 1e-2)
        assert not timing["wrong"]


def test_slicing_is_wrong_where_padding_lies_between_valid_keys(report: dict[str, Any]) -> None:
    for row, timing in timings(report, "_flash_varlen_3"):
        padded = row["share"] not in (None, 1.0)
        gap = row["case"] in GAPS and padded
        assert timing["wrong"] == (gap or row["case"] in PATTERNS), row["case"]


def test_gathering_is_right_where_queries_see_alike(report: dict[str, Any]) -> None:
    for row, timing in timings(report, "_flash_3_varlen_hub"):
        assert timing["wrong"] == (row["case"] in PATTERNS)  # reduced with `any`


def test_the_dense_method_refuses_masks_only(report: dict[str, Any]) -> None:
    for row, timing in timings(report, "_flash_3"):
        assert ("attn_mask" in timing["refused"]) == (row["share"] is not None)
        assert not timing["wrong"]


def test_routes_and_backends_are_named(report: dict[str, Any]) -> None:
    routes = {
        row["case"]: row["route"]
        for row in report["rows"]
        if row["share"] not in (None, 1) or row["case"] in PATTERNS
    }
    assert set(routes) == MASKED
    by_route = {route: {n for n in routes if routes[n] == route} for route in routes.values()}
    assert by_route["seqused"] == {"lumina2", "hunyuan15"}
    assert by_route["band"] == {"acestep-window"}
    assert set(by_route) == {"seqused", "band", "packed"}
    assert {row["backend"] for row in report["rows"]} <= {"flash_for_cpu", "math"}
    assert report["versions"]["kernel"] == "reference"
    assert report["versions"]["torch"] == torch.__version__


def test_the_work_is_what_the_mask_leaves(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        padded = row["share"] not in (None, 1.0)
        assert (row["ideal"] > 1) == (padded or row["case"] in PATTERNS)


def test_the_run_prints_tables_and_draws_a_panel_for_each_sweep(folder: Path) -> None:
    printed = (folder / "stdout").read_text()
    for words in (*NAMES, "wrong", "cudnn refuses", "of ideal", "us more per call"):
        assert words in printed
    with Image.open(folder / "all.png") as picture:
        width, height = picture.size
    assert width > 4 * height  # padding and qwenimage, in two dtypes each


@pytest.mark.parametrize(
    ("kernel", "backend"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "flash"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "cudnn"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "efficient"),
        ("aten::_scaled_dot_product_attention_math", "math"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "flash_for_cpu"),
        ("aten::mul", "unknown"),
    ],
)
def test_a_backend_is_known_by_its_kernel(kernel: str, backend: str) -> None:
    assert backend_in(["aten::scaled_dot_product_attention", kernel]) == backend


def test_only_warnings_of_synchronisation_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run(inputs: object) -> object:
        for text in ("called a synchronizing CUDA operation", "something else") * 2:
            warnings.warn(text, stacklevel=1)
        return inputs

    assert host_syncs(Method(run), None) == 2
    assert modes == ["warn", "default"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.pattern != "window"], ids=lambda case: case.name
)
def test_packed_tokens_are_those_that_the_mask_leaves(case: Case) -> None:
    small = case.small()
    mask = small.mask(small.shares[-1], "cpu")
    packed = small.packed_plan(mask, "cpu")
    pairs = (packed.cu_seqlens_q.diff() * packed.cu_seqlens_k.diff()).sum()
    assert pairs == small.needed_pairs(mask)


def test_an_error_is_seen_where_rows_see_a_key_and_nowhere_else() -> None:
    q = torch.randn(1, 8, 2, 16)
    valid = torch.arange(8) < 6
    mask = valid[None, None, :, None] & valid[None, None, None, :]
    right = functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, attn_mask=mask)
    right = right.transpose(1, 2)
    wrong = right.clone()
    wrong[:, 6:] += 1
    assert error_of(wrong, right, mask) == 0
    wrong[:, :6] *= 1.1
    assert error_of(wrong, right, mask) == pytest.approx(0.1, rel=1e-3)
    assert WRONG_FROM < 0.1
    assert not error_of(right * torch.nan, right, mask) <= WRONG_FROM
