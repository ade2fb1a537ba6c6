"""Try each installed kernel in a process of its own, so that none can end this one."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_fa3.kernels import PROVIDERS, Provider
from diffusers_fa3.tools.info.builds import Build, build_from, is_installed

TIMEOUT_S = 120.0
"""Enough for a kernel that compiles at its first call."""

CHILD = "diffusers_fa3.tools.info.launch"


@dataclass(frozen=True)
class Step:
    """One step of a probe: load, dense, packed or seqused."""

    step: str
    outcome: str
    """ok; skipped, failed or wrong, with the reason; ended: the process died in it; timeout."""
    detail: str = ""


@dataclass(frozen=True)
class Probe:
    """How far a kernel came in a process of its own."""

    kernel: str
    steps: tuple[Step, ...]
    build: Build | None = None

    @property
    def fault(self) -> Step | None:
        """The first step that went wrong."""
        bad = ("failed", "wrong", "ended", "timeout")
        return next((step for step in self.steps if step.outcome in bad), None)

    @property
    def unsafe_to_load(self) -> bool:
        """Whether loading it ended its process, or did not come to an end."""
        fault = self.fault
        return fault is not None and fault.step == "load" and fault.outcome in ("ended", "timeout")


def probe_kernels(
    providers: Iterable[Provider] = PROVIDERS, timeout_s: float = TIMEOUT_S
) -> tuple[Probe, ...]:
    """Load and launch each installed kernel in a process of its own.

    Args:
        providers: of `PROVIDERS`, or of the same kind; `load` must be a function of a module.
        timeout_s: seconds after which a process is ended.

    Returns:
        One for each installed kernel. Those that serve only by name are skipped.
    """
    return tuple(_probe(p, timeout_s) for p in providers if is_installed(p))


def _probe(provider: Provider, timeout_s: float) -> Probe:
    if provider.on_request:
        why = f"only by name, since {provider.on_request}"
        return Probe(provider.name, (Step("load", "skipped", why),))
    with tempfile.TemporaryDirectory() as folder:
        given, log = Path(folder, "provider"), Path(folder, "log")
        given.write_bytes(pickle.dumps(provider))
        log.touch()
        end = _run([sys.executable, "-m", CHILD, str(given), str(log)], timeout_s)
        return _probe_of(provider.name, log.read_text(), end)


def _run(command: list[str], timeout_s: float) -> Step | None:
    """How a process ended, as the outcome of its last step; None if it ended well."""
    # The child sees the modules that this process sees.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return Step("", "timeout", f"not done after {timeout_s:g} s; the process was ended")
    if done.returncode == 0:
        return None
    said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    words = _end_words(done.returncode) + (f": {said}" if said and done.returncode > 0 else "")
    return Step("", "ended", words)


def _end_words(returncode: int) -> str:
    if returncode > 0:
        return f"exit status {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:  # a real-time signal has no name
        return f"signal {-returncode}"


def _probe_of(kernel: str, log: str, end: Step | None) -> Probe:
    """What the log of a child tells; a step that began and has no end is where it ended."""
    steps: dict[str, Step] = {}
    build = None
    for event in _events(log):
        steps[event["step"]] = Step(event["step"], event["outcome"], event["detail"])
        build = build_from(event["build"]) if "build" in event else build
    unfinished = next((name for name, step in steps.items() if step.outcome == "begins"), None)
    if unfinished is not None or end is not None:
        end = end or Step("", "ended", "exit status 0")
        name = unfinished or ("exit" if steps else "start")
        steps[name] = Step(name, end.outcome, end.detail)
    return Probe(kernel, tuple(steps.values()), build)


def _events(log: str) -> Iterator[dict[str, Any]]:
    for line in log.splitlines(keepends=True):
        if line.endswith("\n"):  # the last line may be cut
            yield json.loads(line)
