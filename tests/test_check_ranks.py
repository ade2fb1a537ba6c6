"""`check --ranks N` passes what is exact on ranks, names what is not, and leaves no process behind.

What is broken on purpose runs on the processes of `ranks`. The tests of how processes are started
and ended have functions of few imports, since each new process imports this file.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from command_line import exit_status

from diffusers_fa3 import FA3Error, InputError, UnsupportedModelError
from diffusers_fa3.tools.check.processes import on_ranks

TESTS = Path(__file__).parent
DIGITS = TESTS.parent / "examples" / "digits"
ENDED = 120
"""Seconds in which processes start or end. They need some five."""

# --- what is right and what is broken, on two ranks ----------------------------------------------


def pipeline(name: str) -> tuple[Any, dict[str, Any]]:
    from pipelines import CASES

    (case,) = (case for case in CASES if case.name == name)
    return case.build(), case.inputs()


@contextmanager
def stays_local() -> Iterator[None]:
    """Attention over the keys of this rank alone, as if nothing had been split."""
    from diffusers_fa3.attention import attend
    from diffusers_fa3.layers import frame

    def local(q: Any, k: Any, v: Any, mask: Any, axes: Any, **options: Any) -> Any:
        shared = ("scale", "kernel", "axes_2d", "pack_queries", "switch_id")
        answer: Any = attend(q, k, v, mask, causal=False, **{n: options[n] for n in shared})
        return answer.out, answer

    with mock.patch.object(frame, "attend_split", local):
        yield


@contextmanager
def order_of_ranks_reversed() -> Iterator[None]:
    """Masks whose parts are put together in another order than the keys."""
    parallel = sys.modules["diffusers_fa3.parallel.attend"]
    right = parallel.whole_mask

    def wrong(part: Any, axes: Any, q_tokens: Any, k_tokens: Any, segments: Any) -> Any:
        whole = right(part, axes, q_tokens, k_tokens, segments)
        return torch.cat(list(reversed(whole.clone().split(list(k_tokens), -1))), -1)

    with mock.patch.object(parallel, "whole_mask", wrong):
        yield


@contextmanager
def as_a_ring() -> Iterator[None]:
    from diffusers_fa3.tools.check import on_ranks

    with mock.patch.object(on_ranks, "heads_of", return_value=None):
        yield


def raises_on_rank_1(after: int) -> Any:
    """A kernel that raises on one rank alone, in its calls after the first so many."""
    from diffusers_fa3 import flash_attn_varlen_func

    served = 0

    def out_of_order(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, softmax_scale: Any = None
    ) -> Any:
        nonlocal served
        served += 1
        if dist.get_rank() == 1 and served > after:
            raise RuntimeError("out of order")
        lengths = (cu_seqlens_q, cu_seqlens_k, len(q), len(k))
        return flash_attn_varlen_func(
            q, k, v, *lengths, softmax_scale=softmax_scale, kernel="reference"
        )

    return out_of_order


def wrong_kernel(name: str) -> Any:
    from test_check import WRONG

    (kernel,) = (kernel for kernel in WRONG if kernel.__name__ == name)
    return kernel


def dense_only(q: Any, k: Any, v: Any, softmax_scale: float | None = None) -> Any:
    raise AssertionError("never called")


CHECKS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "right": lambda: (pipeline("qwenimage"), "reference"),
    "ring": lambda: (pipeline("qwenimage"), "reference", as_a_ring),
    "mask of all": lambda: (pipeline("chroma_bool_mask"), "reference"),
    "local text": lambda: (pipeline("wan22"), "auto"),
    "scales": lambda: (pipeline("qwenimage"), wrong_kernel("scales_by_1_01")),
    "local": lambda: (pipeline("qwenimage"), "auto", stays_local),
    "order": lambda: (pipeline("qwenimage"), "auto", order_of_ranks_reversed),
    "order of all": lambda: (pipeline("chroma_bool_mask"), "auto", order_of_ranks_reversed),
    "raises": lambda: (pipeline("qwenimage"), raises_on_rank_1(4)),
    "raises later": lambda: (pipeline("qwenimage"), raises_on_rank_1(8)),
    "refuses": lambda: (pipeline("qwenimage"), dense_only),
}
"""What is checked: a pipeline or model with its arguments, a kernel, and what is broken."""


def check(rank: int, names: list[str]) -> dict[str, Any]:
    """What each check finds on this rank."""
    from diffusers_fa3.tools.check.on_ranks import check_on_ranks

    found = {}
    for name in names:
        (pipe, inputs), kernel, *broken = CHECKS[name]()
        with ExitStack() as all_broken:
            for each in broken:
                all_broken.enter_context(each())
            found[name] = check_on_ranks(pipe, inputs, kernel=kernel)
    return found


@pytest.fixture(scope="module")
def checks() -> dict[str, Any]:
    """What rank 0 of two found in each check; one start of processes for all."""
    from ranks import results
    from releases import QWENIMAGE_MASKS, needs

    needs(*QWENIMAGE_MASKS)
    found, same = results("test_check_ranks:check", 2, list(CHECKS))
    for name in CHECKS:
        assert found[name].problems == same[name].problems, name
    return found


def calls_of(parity: Any) -> list[Any]:
    return [call for layer in parity.layers for call in layer.calls]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("right", "ulysses"),
        ("ring", "ring"),
        ("mask of all", "ulysses"),
        ("local text", "ulysses"),
    ],
)
def test_what_is_exact_passes_with_calls_of_both_ranks(
    checks: dict[str, Any], name: str, way: str
) -> None:
    parity = checks[name]
    assert parity.passed, str(parity)
    assert parity.split in (f"{way}_degree=2", f"{way}_degree=2, {way}_anything=True")
    calls = calls_of(parity)
    assert [call.rank for call in calls].count(0) == [call.rank for call in calls].count(1) > 0
    assert all(step.on_ranks is not None for step in parity.drawn.steps)
    assert parity.drawn.end[1].on_ranks.typical <= parity.drawn.allowed_on_ranks < 1e-4
    assert parity.drawn.note == ""
    assert parity.pictures is not None
    said = str(parity)
    assert f"on 2 ranks ({parity.split}): passed" in said
    assert ", ours on ranks by " in said
    assert "of rank" in said.splitlines()[0]


def test_a_call_is_compared_over_the_keys_of_all_ranks_for_the_queries_of_one(
    checks: dict[str, Any],
) -> None:
    (of_0, of_1) = (
        next(call for call in calls_of(checks["right"]) if call.rank == rank) for rank in (0, 1)
    )
    assert of_0.q_shape[1] + of_1.q_shape[1] == of_0.k_len == of_1.k_len
    assert of_0.mask == f"bool (2, 1, 1, {of_0.k_len})"


def test_a_wrong_kernel_fails_by_layer_and_rank(checks: dict[str, Any]) -> None:
    parity = checks["scales"]
    calls = calls_of(parity)
    assert {call.rank for call in calls if not call.passed} == {0, 1}
    assert all(call.kernel == "scales_by_1_01" for call in calls)
    for layer, problem in zip(parity.layers, parity.problems):
        assert problem.startswith(f"{layer.name}, call {layer.worst.run}, rank {layer.worst.rank}")
        assert ", on scales_by_1_01 (packed): " in problem
    assert "FAILED" in str(parity)


def test_attention_that_stays_on_its_rank_fails_by_layer_and_as_a_whole(
    checks: dict[str, Any],
) -> None:
    parity = checks["local"]
    assert all(not call.passed for call in calls_of(parity))
    assert len(parity.problems) == len(parity.layers) + 1
    assert parity.problems[-1].startswith(
        "ours on 2 ranks ends too far from the default on one process: the latents after the last"
    )
    assert parity.problems[-1].endswith(" is allowed")


def test_parts_of_a_mask_in_a_wrong_order_fail_by_layer_and_as_a_whole(
    checks: dict[str, Any],
) -> None:
    parity = checks["order"]
    assert any(not call.passed for call in calls_of(parity))
    assert "ours on 2 ranks ends too far from" in parity.problems[-1]


def test_a_whole_mask_in_a_wrong_order_fails_as_a_whole(checks: dict[str, Any]) -> None:
    parity = checks["order of all"]
    assert all(call.passed for call in calls_of(parity))  # nobody else knows its order
    (problem,) = parity.problems
    assert "ours on 2 ranks ends too far from" in problem


def test_a_kernel_that_raises_on_one_rank_is_named_and_no_rank_waits(
    checks: dict[str, Any],
) -> None:
    parity = checks["raises"]
    assert {raised.rank for layer in parity.layers for raised in layer.raised} == {1}
    for layer, problem in zip(parity.layers, parity.problems, strict=True):
        assert (
            problem == f"{layer.name}, rank 1, on out_of_order: raised RuntimeError: out of order"
        )
    assert {call.rank for call in calls_of(parity)} == {0}
    assert parity.drawn.note == "the whole is not compared, since the kernel did not serve"
    assert "rank 1: raised RuntimeError" in parity.to_dict()["layers"][0]["raised"][0]
    assert "RAISED  1" in str(parity)
    assert "the kernel did not serve on this rank: out of order" in str(parity)


def test_a_kernel_that_raises_when_the_whole_is_drawn_is_named(checks: dict[str, Any]) -> None:
    assert checks["raises later"].problems == (
        "the run on kernel out_of_order raised RuntimeError: out of order, on rank 1",
    )


def test_a_kernel_that_cannot_serve_fails_on_all_ranks(checks: dict[str, Any]) -> None:
    parity = checks["refuses"]
    assert "raised KernelUnavailableError" in parity.problems[0]
    assert {raised.rank for layer in parity.layers for raised in layer.raised} == {0, 1}


def test_the_dict_has_no_key_that_is_not_documented(checks: dict[str, Any]) -> None:
    found = json.loads(json.dumps(checks["scales"].to_dict(), allow_nan=False))
    text = (TESTS.parent / "docs" / "check.md").read_text()
    for key in {*found, *found["layers"][0]["calls"][0], *found["result"]}:
        assert f"`{key}`" in text, key
    assert found["ranks"] == 2
    assert found["schema"] == 1


def refusals(rank: int) -> list[str]:
    """What stops a check, in words."""
    from diffusers_fa3.tools.check.on_ranks import check_on_ranks

    def fails_if_split(transformer: Any, args: Any) -> None:
        if transformer._parallel_config is not None:
            raise ValueError("no such thing")

    found = []
    for name, broken in (("qwenimage", True), ("pixart_sigma", False)):
        pipe, inputs = pipeline(name)
        if broken:
            pipe.transformer.register_forward_pre_hook(fails_if_split)
        else:
            pipe.transformer.__class__ = type("Unknown", (type(pipe.transformer).__base__,), {})
        try:
            check_on_ranks(pipe, inputs)
        except FA3Error as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_a_model_that_cannot_be_split_is_refused_in_words() -> None:
    from ranks import results

    for splitting, plan in results("test_check_ranks:refusals", 2):
        assert splitting.startswith("InputError: the model must run split over 2 ranks by ")
        assert "got ValueError: no such thing. On CPUs the tokens must divide by the" in splitting
        assert plan.startswith("UnsupportedModelError: ")
        assert "has no plan by which its tokens could be split over ranks" in plan


def every_model(rank: int, family: str, ring: bool) -> dict[str, str]:
    """The problems of each model of a family, or why it is refused."""
    from test_parallel_models import families

    from diffusers_fa3.tools.check.on_ranks import check_on_ranks

    found: dict[str, str] = {}
    for case in families()[family][0]:
        # The masks of the first family are a caller's, who would have to pass a part on each rank.
        layout = case.layouts[0 if family == "own" else -1]
        inputs = {**case.inputs(layout, 0.0), "return_dict": False}
        with as_a_ring() if ring else ExitStack():
            try:
                found[case.name] = "\n".join(check_on_ranks(case.build(), inputs).problems)
            except FA3Error as error:
                found[case.name] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "ring"),
    [("own", False), ("image", False), ("video", True)],
    ids=["own-ulysses", "image-ulysses", "video-ring"],
)
def test_every_model_that_can_be_split_passes(family: str, ring: bool) -> None:
    from ranks import results
    from test_parallel_models import families

    found, _ = results("test_check_ranks:every_model", 2, family, ring)
    refused = families()[family][1]
    assert {name: said for name, said in found.items() if said and name not in refused} == {}


# --- decisions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "ranks", "way"),
    [([24], 4, "ulysses"), ([3], 2, "ring"), ([24, 3], 2, "ring"), ([None], 2, "ring")],
)
def test_heads_decide_which_way_a_model_is_split(
    heads: list[int | None], ranks: int, way: str
) -> None:
    from diffusers_fa3.tools.check.splitting import mode_for

    assert mode_for(heads, ranks)[f"{way}_degree"] == ranks


def test_a_pipeline_without_a_model_of_diffusers_is_refused() -> None:
    from diffusers_fa3.tools.check.splitting import models_to_split

    with pytest.raises(UnsupportedModelError, match="only a model of diffusers can be split"):
        models_to_split(torch.nn.Linear(2, 2))


def test_a_model_without_a_plan_is_named_as_its_user_knows_it() -> None:
    from test_check import stable_diffusion

    from diffusers_fa3 import enable_fa3
    from diffusers_fa3.tools.check.splitting import models_to_split

    pipe = stable_diffusion()
    enable_fa3(pipe, kernel="reference")
    told = r"^UNet2DConditionModel has no plan .*[^.]\. Check it without --ranks$"
    with pytest.raises(UnsupportedModelError, match=told):
        models_to_split(pipe)


def test_the_whole_may_differ_by_eight_times_what_one_process_does() -> None:
    from diffusers_fa3.tools.check.budget import Errors, allowed_on_ranks

    small, large, broken = Errors(1.0, 0.01), Errors(1.0, 0.02), Errors(math.inf, math.nan)
    assert allowed_on_ranks(small, large, 0.001) == pytest.approx(0.161)
    assert allowed_on_ranks(large, None, 0.0) == pytest.approx(0.16)
    assert allowed_on_ranks(small, broken, 0.0) == pytest.approx(0.08)


def test_what_is_not_a_number_is_too_far() -> None:
    from diffusers_fa3.tools.check.budget import Errors
    from diffusers_fa3.tools.check.parity import Difference, Drawn, _too_far

    right = Errors(1e-6, 1e-7)
    for typical, problems in ((1e-7, 0), (math.nan, 1), (math.inf, 1), (1e-2, 1)):
        difference = Difference(right, right, Errors(typical, typical))
        assert len(_too_far(Drawn((), difference, rounding=1e-7), 2)) == problems


def test_ranks_that_cannot_be_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="a CUDA device for each rank; got 3 ranks and 2 devices"):
        on_ranks(adds, 0, 3, "cuda", print)
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(InputError, match="which this build of torch lacks"):
        on_ranks(adds, 0, 2, "cpu", print)


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_digits_pass_and_json_is_all_that_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from diffusers import ContextParallelConfig

    if not hasattr(ContextParallelConfig, "ring_anything"):
        pytest.skip("this diffusers cannot split a text of an odd number of tokens")
    options = ("--device", "cpu", "--ranks", "2", "--steps", "1", "--json", "--out", str(tmp_path))
    assert exit_status("check", str(DIGITS), *options) == 0
    said = capfd.readouterr()
    found = json.loads(said.out)
    assert found["passed"]
    assert found["ranks"] == 2
    assert found["split"].startswith("ring_degree=2")  # it has 3 heads
    assert {call["rank"] for layer in found["layers"] for call in layer["calls"]} == {0, 1}
    assert said.err == ""
    page = (tmp_path / "report.html").read_text()
    assert f"on kernel reference (asked for: auto), on 2 ranks ({found['split']})" in page
    assert "<th>of rank</th>" in page
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["no/such/folder", "--ranks", "2"], "MODEL must be a pipeline of diffusers that can be"),
        ([str(DIGITS), "--ranks", "0"], "a number above 0; got 0"),
        ([str(DIGITS), "--ranks", "two"], "a number above 0; got two"),
        ([str(DIGITS), "--ranks", "2", "--kernel", "fa3_fwd"], "fa3_fwd"),
    ],
)
def test_what_cannot_run_exits_with_2_and_is_told_once(
    options: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("check", *options, "--device", "cpu") == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count(says) == 1
    assert multiprocessing.active_children() == []


# --- processes -----------------------------------------------------------------------------------


def adds(args: int, device: torch.device, tell: Callable[[str], None]) -> int:
    tell(f"adding on a {device}")
    print("a library's own words")
    number = torch.tensor([args + dist.get_rank()])
    dist.all_reduce(number)
    return int(number)


def dies(args: object, device: object, tell: object) -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def leaves(args: object, device: object, tell: object) -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def raises(args: object, device: object, tell: object) -> None:
    if dist.get_rank() == 1:
        raise ValueError("no such thing")
    dist.barrier()


def hangs(args: object, device: object, tell: object) -> None:
    if dist.get_rank() == 1:
        time.sleep(10 * ENDED)
    dist.barrier()


def too_large(args: object, device: object, tell: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TB")


@pytest.mark.slow
def test_the_answer_is_that_of_rank_0(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    assert on_ranks(adds, 20, 2, "cpu", told.append) == 41
    assert told == ["adding on a cpu"]
    assert capfd.readouterr().out == ""
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "patience", "says"),
    [
        (dies, ENDED, "every rank must live until the check is done; rank 1 ended with signal SIG"),
        pytest.param(
            *(leaves, ENDED, "rank 1 ended with exit status 3. If the system ended it for want of"),
            marks=pytest.mark.slow,
        ),
        (raises, ENDED, "every rank must end the check; rank 1 raised ValueError: no such thing"),
        pytest.param(
            *(hangs, 15, "every rank must end the check; rank 0 raised .*[Tt]imed out"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_in_trouble_ends_all(
    work: Any, patience: int, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=says):
        on_ranks(work, None, 2, "cpu", lambda stage: None, timedelta(seconds=patience))
    assert time.monotonic() - start < ENDED
    assert multiprocessing.active_children() == []
    said = capfd.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err


@pytest.mark.slow
def test_too_little_memory_of_a_rank_is_known_as_such() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="2 TB"):
        on_ranks(too_large, None, 2, "cpu", lambda stage: None)


def writes_its_number(folder: str, device: object, tell: object) -> None:
    file = Path(folder, f"{dist.get_rank()}.part")
    file.write_text(str(os.getpid()))
    file.rename(Path(folder, str(dist.get_rank())))
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(10 * ENDED)
    dist.barrier()


STARTED = """
import sys
sys.path.insert(0, {tests!r})
from test_check_ranks import writes_its_number
from diffusers_fa3.tools.check.processes import on_ranks
on_ranks(writes_its_number, {folder!r}, 2, "cpu", print)
"""


def lives(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def within(seconds: float, done: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
    return done()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="asks Linux whether a process runs")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_the_command(how: signal.Signals, tmp_path: Path) -> None:
    code = STARTED.format(tests=str(TESTS), folder=str(tmp_path))
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        files = [tmp_path / str(rank) for rank in (0, 1)]
        assert within(ENDED, lambda: all(file.exists() for file in files))
        ranks = [int(file.read_text()) for file in files]
        assert all(map(lives, ranks))
        # Ctrl-C reaches all processes of a terminal; a kill does not.
        os.killpg(started.pid, how) if how == signal.SIGINT else started.send_signal(how)
        _, said = started.communicate(timeout=ENDED)
        assert within(ENDED, lambda: not any(map(lives, ranks)))
        assert said.count("Traceback") == (how == signal.SIGINT), said
    finally:
        with ExitStack() as quiet:
            quiet.callback(started.wait)
            started.kill()
