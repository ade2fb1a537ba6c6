"""Who is fastest in calls of a kind: all who can serve take turns once, and the clock decides.

As `torch.backends.cudnn.benchmark` does for convolutions.
"""

from __future__ import annotations

import statistics
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import torch

from diffusers_fa3.errors import FallbackWarning

ROUNDS = 15
"""Calls of each rival that are timed."""
KEPT = 1024
"""The most kinds that are remembered; the oldest are forgotten."""

Rivals = Mapping[str, Callable[[], bool]]
"""What each rival does for a call, by name. False: it cannot serve."""

clock = time.perf_counter


class Choice(NamedTuple):
    """The fastest in calls of a kind."""

    name: str
    lead: float
    """How many times as long the second best took; 1 without a second."""


class Races:
    """The choices made so far. Threads share it."""

    def __init__(self) -> None:
        self._choices: OrderedDict[Hashable, Choice] = OrderedDict()
        self._one_at_a_time = threading.Lock()

    def known(self, kind: Hashable) -> Choice | None:
        """The choice for calls of a kind, if there was one before."""
        return self._choices.get(kind)

    def decide(self, kind: Hashable, rivals: Rivals, device: torch.device) -> Choice | None:
        """The choice for calls of a kind, by the clock; None if no rival can serve."""
        with self._one_at_a_time:  # two that are timed at once would slow each other
            known = self.known(kind)
            if known is not None:
                return known
            times = race(rivals, device)
            if not times:
                return None
            best, *others = sorted(times, key=times.__getitem__)
            choice = Choice(best, times[others[0]] / times[best] if others else 1.0)
            self.remember(kind, choice)
            return choice

    def remember(self, kind: Hashable, choice: Choice) -> None:
        """Keep a choice."""
        self._choices[kind] = choice
        if len(self._choices) > KEPT:
            self._choices.popitem(last=False)


races = Races()


def race(rivals: Rivals, device: torch.device) -> dict[str, float]:
    """Seconds for a call of each rival that can serve: medians, in turns.

    The device is idle before each call, so that the host's time counts in full: in some models it
    hides behind the device's, in others it is all that counts.
    """
    able = {name: call for name, call in rivals.items() if _can_serve(name, call)}
    times: dict[str, list[float]] = {name: [] for name in able}
    for number in range(ROUNDS):
        for name in list(able) if number % 2 else list(reversed(able)):
            times[name].append(_time(able[name], device))
    return {name: statistics.median(found) for name, found in times.items()}


def _can_serve(name: str, call: Callable[[], bool]) -> bool:
    """Call it once: the first call of a kernel may load and compile things."""
    try:
        return call()
    except Exception as error:  # a kernel may raise any; there are others
        words = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        warnings.warn(
            f'{name} is left out of kernel="fastest", since it raised {words}',
            FallbackWarning,
            stacklevel=2,
        )
        return False


def _time(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = clock()
    call()
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
