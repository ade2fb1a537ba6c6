"""kernel="fastest": those who can serve take turns once per kind of call; the clock decides."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from switching import BY_NAME
from torch import Tensor, nn
from zoo import CASES

from diffusers_fa3 import (
    FallbackWarning,
    attention,
    coverage,
    disable_fa3,
    enable_fa3,
    plan_packing,
)
from diffusers_fa3 import fastest as fastest_module
from diffusers_fa3.attention import attend, default_attention
from diffusers_fa3.fastest import Kind, bucket
from diffusers_fa3.kernels import race as race_module
from diffusers_fa3.kernels.race import KEPT, Choice, Races, race

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def races(monkeypatch: pytest.MonkeyPatch) -> Races:
    """None of the choices of other tests."""
    fresh = Races()
    monkeypatch.setattr(fastest_module, "races", fresh)
    return fresh


class Track:
    """Rivals whose calls take the time that is said, on a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        self.now = 0.0
        self.calls: Counter[str] = Counter()
        self.seconds = seconds
        monkeypatch.setattr(race_module, "clock", lambda: self.now)

    def rivals(self) -> dict[str, Callable[[], bool]]:
        return {name: lambda name=name: self.run(name) for name in self.seconds}

    def run(self, name: str) -> bool:
        self.calls[name] += 1
        self.now += self.seconds[name]
        return True


def test_the_fastest_is_chosen_with_its_lead_once_per_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    track, races = Track(monkeypatch, slow=3e-4, fast=1e-4, middle=1.5e-4), Races()
    choice = races.decide("kind", track.rivals(), CPU)
    assert choice is not None
    assert choice.name == "fast"
    assert choice.lead == pytest.approx(1.5)
    ran = track.calls.total()
    assert races.decide("kind", track.rivals(), CPU) == races.known("kind") == choice
    assert track.calls.total() == ran
    assert races.known("another") is None


def test_one_slow_turn_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    track = Track(monkeypatch, first=1e-4, second=1.2e-4)
    rivals = track.rivals()

    def hiccups() -> bool:
        track.now += 0.5 if track.calls["first"] == 5 else 0.0
        return track.run("first")

    times = race({**rivals, "first": hiccups}, CPU)
    assert min(times, key=times.__getitem__) == "first"


def test_one_that_raises_is_left_out_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    track, races = Track(monkeypatch, fine=1e-4), Races()

    def broken() -> bool:
        raise RuntimeError("no kernel image is available")

    rivals = {**track.rivals(), "broken": broken, "unable": lambda: False}
    with pytest.warns(FallbackWarning, match="broken is left out of kernel=.fastest., since it ra"):
        choice = races.decide("kind", rivals, CPU)
    assert choice == Choice("fine", 1.0)
    with pytest.warns(FallbackWarning, match="no kernel image"):
        assert races.decide("nobody", {"broken": broken}, CPU) is None


def test_what_was_learnt_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    track, races = Track(monkeypatch, only=1.0), Races()
    for kind in range(KEPT + 2):
        races.decide(kind, track.rivals(), CPU)
    assert races.known(1) is None
    assert races.known(2) is not None


def test_threads_that_meet_a_kind_at_once_time_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    track, races = Track(monkeypatch, only=1.0), Races()
    start = threading.Barrier(4)

    def meet() -> None:
        start.wait()
        races.decide("kind", track.rivals(), CPU)

    threads = [threading.Thread(target=meet) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert track.calls["only"] == 1 + race_module.ROUNDS


def test_buckets_are_a_quarter_of_a_power_of_two_apart() -> None:
    assert [bucket(n) for n in (0, 1, 7, 8, 9, 10, 1023, 1024, 1279, 1280)] == [
        *(0, 1, 7, 8, 8, 10, 896, 1024, 1024, 1280)
    ]


# --- calls and models ----------------------------------------------------------------------------


class Rigged(Races):
    """Races with a winner that is known before."""

    def __init__(self, winner: str) -> None:
        super().__init__()
        self.winner = winner
        self.asked: list[tuple[str, ...]] = []

    def decide(self, kind, rivals, device):  # type: ignore[no-untyped-def]
        self.asked.append(tuple(rivals))
        for call in rivals.values():
            call()
        self._choices[kind] = Choice(self.winner, 1.25)
        return self._choices[kind]


@pytest.fixture(params=["default", "reference"])
def rigged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rigged:
    found = Rigged(request.param)
    monkeypatch.setattr(fastest_module, "races", found)
    return found


def qkv(length: int = 6) -> list[Tensor]:
    return list(torch.randn(3, 2, length, 4, 8, generator=torch.Generator().manual_seed(0)))


MASKS = {
    "none": None,
    "keys": torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 1, 1]], dtype=torch.bool),
    "queries and keys": torch.ones(6, 6, dtype=torch.bool).tril()[None, None],
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_call_is_exact_whoever_wins(mask: str, rigged: Rigged) -> None:
    given = MASKS[mask]
    for _ in range(3):
        out = attention(*qkv(), given, kernel="fastest")
        torch.testing.assert_close(out, default_attention(*qkv(), given, None, False))
    # Does the default win with one key left, too?
    times = 1 + (mask != "none" and rigged.winner == "default")
    assert rigged.asked == times * [("reference", "default")]


def test_the_winner_serves_and_all_compete_on_the_call_itself(
    rigged: Rigged, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, masks = [], []

    def recorded(*args: object, kernel: object, **options: object) -> object:
        kernels.append(kernel)
        return attend(*args, kernel=kernel, **options)

    def default(*args: object) -> Tensor:
        masks.append(args[3])
        return default_attention(*args)

    monkeypatch.setattr(fastest_module, "attend", recorded)
    monkeypatch.setattr(fastest_module, "default_attention", default)
    for _ in range(2):
        attention(*qkv(), MASKS["keys"], kernel="fastest")
    mask, *one_key = masks
    assert torch.equal(mask[:, 0, 0], MASKS["keys"])
    if rigged.winner == "default":
        assert [mask[:, 0, 0].sum(-1).tolist() for mask in one_key] == [[1, 1]]
        assert kernels == ["reference"] * 2
    else:
        assert (one_key, kernels) == ([], ["reference"] * 3)


def test_a_call_for_the_default_says_so(rigged: Rigged) -> None:
    answer = fastest_module.attend_fastest(*qkv(), None, scale=None, causal=False)
    assert answer.lead == 1.25
    if rigged.winner == "default":
        assert answer.reason == "the default is the fastest in calls of this kind"


def test_out_receives_the_result_whoever_wins(rigged: Rigged) -> None:
    out = torch.empty(2, 6, 4, 8)
    assert attention(*qkv(), kernel="fastest", out=out) is out
    torch.testing.assert_close(out, default_attention(*qkv(), None, None, False))


def test_where_pytorch_cannot_serve_it_does_not_compete(rigged: Rigged) -> None:
    if rigged.winner == "default":
        pytest.skip("it does not compete")
    attention(*qkv(), kernel="fastest", return_lse=True)
    plan = plan_packing(MASKS["keys"], batch=2, q_len=6, k_len=6)
    attention(*qkv(), plan, kernel="fastest")
    assert rigged.asked == [("reference",)] * 2


def test_a_mask_that_no_kernel_takes_is_a_fallback_not_a_choice(rigged: Rigged) -> None:
    with pytest.warns(FallbackWarning, match="a bias, not a mask"):
        attention(*qkv(), torch.randn(1, 1, 6, 6), kernel="fastest")
    assert not rigged.asked


def test_lengths_of_a_bucket_are_timed_once_and_others_anew(rigged: Rigged) -> None:
    for length in (64, 66, 70, 79, 80):
        attention(*qkv(length), kernel="fastest")
    assert len(rigged.asked) == 2


def test_how_much_a_mask_leaves_is_part_of_the_kind(rigged: Rigged) -> None:
    for valid in (29, 28, 8):
        attention(*qkv(32), torch.arange(32)[None] < torch.tensor([[valid], [2]]), kernel="fastest")
    assert len(rigged.asked) == 2  # 28 and 8; or 28 and one key, where the default won both


def test_a_default_that_wins_with_many_keys_alone_is_asked_anew(rigged: Rigged) -> None:
    def decide(kind: Kind, rivals: Any, device: torch.device) -> Choice:
        rigged.asked.append(tuple(rivals))
        choice = Choice("default" if kind.k_tokens > 16 else "reference", 2.0)
        rigged.remember(kind, choice)
        return choice

    rigged.decide = decide  # type: ignore[method-assign]  # this test's own clock
    for valid, asked in ((29, 2), (28, 2), (8, 3), (29, 3)):
        mask = torch.arange(32)[None] < torch.tensor([[valid], [2]])
        out = attention(*qkv(32), mask, kernel="fastest")
        torch.testing.assert_close(out, default_attention(*qkv(32), mask, None, False))
        assert len(rigged.asked) == asked


def test_gradients_are_not_timed_and_use_what_is_known(rigged: Rigged) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    with_gradient = attention(q, k, v, kernel="fastest")
    assert not rigged.asked
    attention(*qkv(), kernel="fastest")
    for out in (with_gradient, attention(q, k, v, kernel="fastest")):
        expected = torch.autograd.grad(default_attention(q, k, v, None, None, False).sum(), q)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), q), expected)
    assert len(rigged.asked) == 1


def test_a_compiled_call_times_nothing(rigged: Rigged) -> None:
    call = torch.compile(
        lambda q, k, v: attention(q, k, v, kernel="fastest"), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(call(*qkv()), default_attention(*qkv(), None, None, False))
    assert not rigged.asked


MODELS = [name for name in ("qwenimage", "flux", "unet_sd15", "chroma") if name in BY_NAME]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_exact_and_coverage_tells_who_was_chosen(name: str, rigged: Rigged) -> None:
    case = next(case for case in CASES if case.name == name)
    layout = "gap" if "gap" in case.layouts else "none"
    model: nn.Module = case.build()
    expected = case.run(model, layout)
    enable_fa3(model, kernel="fastest", fallback="error")
    for _ in range(2):
        torch.testing.assert_close(case.run(model, layout), expected, rtol=1e-5, atol=1e-5)
    report = coverage(model)
    total = sum(sum(row.choices.values()) for row in report.rows)
    assert report.fallbacks == 0
    assert total > 0
    assert {choice for row in report.rows for choice in row.choices} == {f"{rigged.winner}, 1.2x"}
    by_choice = total if rigged.winner == "default" else 0
    assert report.chosen_default == by_choice
    assert report.calls == total - by_choice
    assert f"the fastest, {total} times: {rigged.winner}, 1.2x" in str(report)
    assert (f"0 on the default attention, {total} there by choice" in str(report)) == bool(
        by_choice
    )
    assert report.to_dict()["chosen_default"] == by_choice
    disable_fa3(model)


def test_the_environment_may_say_fastest(monkeypatch: pytest.MonkeyPatch, rigged: Rigged) -> None:
    monkeypatch.setenv("DIFFUSERS_FA3_KERNEL", "fastest")
    case = next(case for case in CASES if case.name == "flux")
    model = case.build()
    enable_fa3(model)
    case.run(model, "none")
    assert rigged.asked


def test_by_the_real_clock_somebody_wins() -> None:
    out = attention(*qkv(), MASKS["keys"], kernel="fastest")
    torch.testing.assert_close(out, default_attention(*qkv(), MASKS["keys"], None, False))
