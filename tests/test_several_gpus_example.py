"""`examples/several_gpus.py`, started by torchrun, draws on two processes what one draws."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import several_gpus
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from digits_task import MODEL_DIR, SAMPLING_STEPS
from PIL import Image
from ranks import end_all
from releases import QWENIMAGE_MASKS, has
from several_gpus import CannotStart, degrees
from test_examples import assert_same_pictures

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "several_gpus.py"
PAGE = ROOT / "docs" / "several_gpus.md"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENDED = 90
"""Seconds after which the processes are killed. They need some ten."""

ON_CPUS = {
    "import os": "import os\nfrom unittest import mock",
    'dist.init_process_group("nccl")': 'dist.init_process_group("cpu:gloo")',
    'torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))': "torch.set_num_threads(1)",
    "Qwen/Qwen-Image": str(MODEL_DIR),
    "torch_dtype=torch.bfloat16": "torch_dtype=torch.float32",
    '.to("cuda")': "",
    "pipe.transformer.enable_parallelism": (  # as in the example
        'with mock.patch("torch.accelerator.device_count", dist.get_world_size): '
        "pipe.transformer.enable_parallelism"
    ),
    "generator=noise": "generator=noise, num_inference_steps=2, height=32, width=32",
}
"""What a program for GPUs says, and what it says here."""

LAYERS, HEADS, HEAD_DIM = 3, 3, 32
TOKENS = 8 + 16  # of the longest prompt, and of a picture


def torchrun(program: Path, *args: str, cwd: Path = ROOT) -> str:
    """What a program prints on two processes; an error of it fails the test."""
    told = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    started = subprocess.Popen(
        [*TORCHRUN, str(program), *args],
        cwd=cwd,
        env=os.environ | told | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    # torchrun gives each process a session of its own; it ends them when it is told to end.
    try:
        said, _ = started.communicate(timeout=ENDED)
    except subprocess.TimeoutExpired:
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.communicate(timeout=ENDED)
        raise
    finally:
        end_all(started.pid)
    assert started.returncode == 0, said
    return said


def test_two_processes_draw_what_one_draws(tmp_path: Path) -> None:
    out = tmp_path / "digits.png"
    said = torchrun(EXAMPLE, "--kernel", "reference", "--out", str(out))
    masks = has(QWENIMAGE_MASKS[0])

    calls = LAYERS * SAMPLING_STEPS
    assert f"reference  {'packed' if masks else 'dense'} {calls}" in said
    assert f"{calls} calls on a kernel, 0 on the default attention" in said
    (difference,) = re.findall(r"2 ranks - one process: largest difference (\S+)", said)
    assert float(difference) <= 1e-5

    # The heads are 3, so it is a ring: each rank sends its half of k and v in every call, and in
    # every step its half of the mask.
    assert "QwenImageTransformer2DModel split over 2 ranks: ring_degree=2" in said
    pictures = len(several_gpus.PROMPTS)
    whole = pictures * TOKENS * HEADS * HEAD_DIM * 4
    expected = calls * whole + masks * SAMPLING_STEPS * pictures * TOKENS // 2
    sent = re.findall(r"sent by rank (\d): ([\d,]+) bytes", said)
    assert sent == [("0", f"{expected:,}"), ("1", f"{expected:,}")]

    assert_same_pictures(out, pictures)


def test_the_program_of_the_page_runs(tmp_path: Path) -> None:
    if not hasattr(ContextParallelConfig, "ring_anything"):
        pytest.skip("this diffusers has no ring_anything")
    (program,) = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for said, here in ON_CPUS.items():
        assert program.count(said) == 1, said
        program = program.replace(said, here)
    (tmp_path / "cat.py").write_text(program)
    torchrun(tmp_path / "cat.py", cwd=tmp_path)
    assert np.asarray(Image.open(tmp_path / "cat.png")).std() > 10


@pytest.mark.parametrize(
    ("asked", "ranks", "heads", "chosen"),
    [
        ((None, None), 4, 24, (4, 1)),
        ((None, None), 2, 3, (1, 2)),  # 3 heads cannot be shared by 2
        ((None, None), 2, None, (1, 2)),
        ((2, None), 8, 24, (2, 4)),
        ((None, 2), 8, 24, (4, 2)),
        ((1, None), 2, 24, (1, 2)),
        ((2, 2), 4, 24, (2, 2)),
    ],
)
def test_degrees_that_are_left_open_are_filled_up(
    asked: tuple[int | None, int | None],
    ranks: int,
    heads: int | None,
    chosen: tuple[int, int],
) -> None:
    ulysses, ring = chosen
    assert degrees(*asked, ranks, heads) == {"ulysses_degree": ulysses, "ring_degree": ring}


@pytest.mark.parametrize("asked", [(3, None), (None, 8), (2, 4)])
def test_degrees_that_are_not_the_number_of_processes_are_refused(
    asked: tuple[int | None, int | None],
) -> None:
    with pytest.raises(CannotStart, match="must be the number of processes, 4"):
        degrees(*asked, 4, 24)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "start it by `torchrun --nproc-per-node 2 examples/several_gpus.py`"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "one process has nothing to split"),
    ],
)
def test_without_several_processes_it_says_how_to_start_it(
    environment: dict[str, str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["several_gpus.py"])
    assert several_gpus.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said


def test_of_the_ranks_with_one_reason_the_first_says_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    reasons = ("no such model", "no such model", "another", "no such model")
    assert [several_gpus.say_once(reason) for reason in reasons] == [2, 2, 2, 2]
    assert capsys.readouterr().err == "error: no such model\nerror: another\n"


def test_too_few_devices_are_noticed_by_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CannotStart, match="there are 1 CUDA devices here"):
        several_gpus.check(argparse.Namespace(device="cuda"))
