"""The benchmark measures every method on every call, and checks results. Times are not tested."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import exit_status
from PIL import Image
from releases import needs
from torch.nn import functional

from diffusers_fa3 import __version__
from diffusers_fa3.errors import InputError
from diffusers_fa3.tools import cli
from diffusers_fa3.tools.bench import command
from diffusers_fa3.tools.bench.cases import CASES, SHARES, Case, cases_of
from diffusers_fa3.tools.bench.measure import WRONG_FROM, error_of, rows_to_compare
from diffusers_fa3.tools.bench.methods import Method, backend_in, host_syncs
from diffusers_fa3.tools.bench.plot import panels, plot
from diffusers_fa3.tools.bench.run import Results
from diffusers_fa3.tools.bench.tables import METHODS, Row, Timing

NAMES = [case.name for case in CASES]
GAPS = {case.name for case in CASES if case.gap}
PATTERNS = {case.name for case in CASES if case.pattern}
BY_NAME = {case.name: case for case in CASES}
MASKED = {case.name for case in CASES if case.shares[-1] is not None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the output of one small run of all cases."""
    needs("0.37", "expects two results of FlashAttention-3, which gives one")
    folder = tmp_path_factory.mktemp("bench")
    files = ("--json", str(folder / "all.json"), "--plot", str(folder / "all.png"))
    options = ("--small", "--rounds", "2", "--kernel", "reference", "--device", "cpu")
    command = Path(sys.executable).with_name("diffusers-fa3")
    done = subprocess.run(
        [command, "bench", *options, *files, "--model", "all"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all.json").read_text())


def timings(report: dict[str, Any], method: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return each row that has this method with its timing."""
    rows = [(row, row["methods"][method]) for row in report["rows"] if method in row["methods"]]
    assert rows
    return rows


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
        queries_too = row["share"] is not None and BY_NAME[row["case"]].pads_are_queries
        named = [name for name in METHODS if name != "ours+q" or queries_too]
        assert list(row["methods"]) == named
        assert row["input_sets"] >= 2
        for timing in row["methods"].values():
            if timing["refused"]:
                assert len(timing["refused"].split()) > 2
                assert timing["ms"] is None
            else:
                assert len(timing["times_ms"]) == 2
                assert timing["tflops"] > 0
                assert timing["peak_mb"] > 0


@pytest.mark.parametrize("method", ["default", "ours", "ours+q", "ours+plan", "bare"])
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
        assert timing["wrong"] == (row["case"] in PATTERNS)  # it reduces the mask with `any`


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
    assert by_route["seqused"] == {"lumina2", "hunyuanvideo15", "scale"}
    assert by_route["band"] == {"acestep"}
    assert set(by_route) == {"seqused", "band", "packed"}
    assert {row["backend"] for row in report["rows"]} <= {"flash_for_cpu", "math"}
    assert report["versions"]["kernel"] == "reference"
    assert report["versions"]["torch"] == torch.__version__


def test_the_work_is_what_the_mask_leaves(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        padded = row["share"] not in (None, 1.0)
        assert (row["ideal"] > 1) == (padded or row["case"] in PATTERNS)
        packs_more = padded and BY_NAME[row["case"]].pads_are_queries
        assert (row["ideal_q"] > row["ideal"]) == packs_more


def test_the_run_prints_tables_and_draws_a_panel_for_each_sweep(folder: Path) -> None:
    printed = (folder / "stdout").read_text()
    for words in (
        "padding",
        "wrong",
        "cudnn refuses",
        "of ideal",
        "peak memory",
        "more per call, kernels aside",
        "_flash_*: diffusers' own packing for these backends, run on the kernel that serves ours",
    ):
        assert words in printed
    with Image.open(folder / "all.png") as picture:
        width, height = picture.size
    assert width > 2 * height  # padding, qwenimage and scale, in two dtypes each


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
    rows = rows_to_compare(mask, padded=True)
    right = functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, attn_mask=mask)
    right = right.transpose(1, 2)
    wrong = right.clone()
    wrong[:, 6:] += 1
    assert error_of(wrong, right, rows) == 0
    wrong[:, :6] *= 1.1
    assert error_of(wrong, right, rows) == pytest.approx(0.1, rel=1e-3)
    assert WRONG_FROM < 0.1
    assert not error_of(right * torch.nan, right, rows) <= WRONG_FROM


def test_rows_of_padding_are_compared_but_where_they_are_left_out() -> None:
    mask = (torch.arange(8) < 6)[None, None, None]
    right = torch.ones(1, 8, 2, 16)
    left_out = right * (torch.arange(8) < 6)[None, :, None, None]
    assert error_of(left_out, right, rows_to_compare(mask, padded=False)) == 0
    assert error_of(left_out, right, rows_to_compare(mask, padded=True)) > WRONG_FROM


# --- the command ---------------------------------------------------------------------------------


def asked(*options: str) -> list[Case]:
    """The calls that the options ask for, on a CPU."""
    return command._cases(cli._parser().parse_args(["bench", "--device", "cpu", *options]))


def test_a_model_is_known_by_its_name_and_by_its_class() -> None:
    assert asked("--model", "QwenImage") == [BY_NAME["qwenimage"]]
    assert asked("--model", "QwenImageTransformer2DModel") == [BY_NAME["qwenimage"]]
    assert [c.name for c in asked("--model", "sdxl", "wan")] == ["sdxl-self", "sdxl-cross", "wan"]
    assert asked("--model", "all") == list(CASES)


def test_a_class_of_diffusers_brings_its_heads() -> None:
    (case,) = cases_of("CogVideoX")
    assert (case.heads, case.head_dim, case.text, case.image) == (30, 64, 512, 4096)
    (other,) = cases_of("Flux2")
    assert other.heads != BY_NAME["flux"].heads
    with pytest.raises(InputError, match=r"model is one of padding, flux.*got NoSuchModel"):
        cases_of("NoSuchModel")
    with pytest.raises(InputError, match="got UNet2DConditionModel"):
        cases_of("UNet2DConditionModel")


def test_options_change_a_call_or_make_one() -> None:
    (case,) = asked("--model", "qwenimage", "--batch", "4", "--valid", "none,0.1,1")
    assert (case.batch, case.heads, case.shares) == (4, 24, (None, 0.1, 1.0))
    (case,) = asked("--heads", "8", "--kv-heads", "2", "--head-dim", "64", "--padding", "outer")
    assert (case.heads, case.kv_heads, case.head_dim, case.outer, case.gap) == (
        8,
        2,
        64,
        True,
        False,
    )
    assert case.shares == SHARES
    lengths = asked("--model", "padding", "--lengths", "96,300")
    assert [(c.text, c.image) for c in lengths] == [(32, 64), (100, 200)]
    assert asked() == [BY_NAME["padding"]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--valid", "0.5,2"], "none, or a share above 0 and up to 1; got 2"),
        (["--valid", "half"], "none, or a share above 0 and up to 1; got half"),
        (["--lengths", "0"], "a number above 0; got 0"),
        (["--dtype", "int8"], "one of fp32"),
        (["--model", "NoSuchModel"], "got NoSuchModel"),
        (["--model", "flux", "--plot", "x.png"], "give three or more --valid"),
        (
            ["--valid", "0.1,0.2,0.3", "--plot", "x.docx"],
            "format from the file's suffix; got x.docx",
        ),
    ],
)
def test_bad_options_are_refused_in_words(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("bench", *options) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (tmp_path / "nosuch" / "x", tmp_path):
        assert exit_status("bench", "--small", "--valid", "0.1,0.2,0.3", option, str(file)) == 2
        said = capsys.readouterr()
        assert f"write into a folder that exists; got {option} {file}" in said.err
        assert said.out == ""


def test_a_time_within_the_noise_is_told_as_such() -> None:
    for overhead, told in {
        -3.0: "within the noise",
        0.5: "within the noise",
        4.0: "4.0 us",
    }.items():
        assert command._overhead_of(Results((), {}, {}, overhead, 1.0)) == told


def test_the_release_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("--version") == 0
    assert capsys.readouterr().out == f"diffusers-fa3 {__version__}\n"


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.startswith("diffusers_fa3.tools.bench")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert exit_status("bench", "--small") == 2
    assert "pip install 'diffusers-fa3[bench]'" in capsys.readouterr().err


def row(tokens: int, share: float | None) -> Row:
    times = {name: Timing(ms=float(tokens)) for name in METHODS}
    return Row("x", "float32", tokens, share, "packed", "", "", 2.0, 4.0, 0.1, 1, 1, 2, times)


def test_every_sweep_is_a_panel() -> None:
    shares = (None, 0.5, 0.75, 1.0)
    (panel,) = panels([row(64, share) for share in shares])
    assert [panel.where(r) for r in panel.rows] == [50, 25, 0]
    assert [panel.ideal(r) for r in panel.rows] == [32, 32, 32]
    both = panels([row(n, share) for n in (64, 128, 256) for share in shares])
    assert [p.by_length for p in both] == [False] * 3 + [True] * 3
    assert [both[3].where(r) for r in both[3].rows] == [64, 128, 256]
    assert not panels([row(64, share) for share in (None, 0.5, 1.0)])


def test_without_a_sweep_there_is_no_plot(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a plot needs 3 shares of valid text, or as many lengths"):
        plot([row(64, 0.5)], str(tmp_path / "x.png"))
