"""Run a function on several processes that can reach each other by gloo, bounded in time.

A second interpreter imports what is needed, once for all tests of this process, and does nothing
else but fork. Each call has it fork a leader of a session of its own, which forks the ranks. What
the ranks return comes back as a list; an error of any of them fails the test.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

HERE = Path(__file__).parent
ENDED = 120
"""Seconds after which ranks are killed. They need some ten."""


def run(function: str, world: int, *args: Any, timeout: int = 60) -> list[Any]:
    """What `function`, "module:name" of a test file, returns on each of `world` ranks.

    It is called as `name(rank, *args)`, with torch.distributed ready; no collective takes longer
    than `timeout` seconds. A rank that raises ends, and returns its exception in the place of a
    result.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "args").write_bytes(pickle.dumps(args))
        asked = {"function": function, "world": world, "folder": folder, "timeout": timeout}
        forks = _forks()
        forks.stdin.write(json.dumps({**asked, "env": _env()}) + "\n")
        leader = int(forks.stdout.readline())
        ended, _, _ = select.select([forks.stdout], [], [], ENDED)
        end_all(leader)
        assert forks.stdout.readline() == "ended\n"
        said = Path(folder, "said").read_text()
        assert ended, f"not ended within {ENDED} seconds:\n{said}"
        files = [Path(folder, str(rank)) for rank in range(world)]
        assert all(file.exists() for file in files), said
        return [pickle.loads(file.read_bytes()) for file in files]


def results(function: str, world: int, *args: Any, timeout: int = 60) -> list[Any]:
    """`run`, where no rank may raise."""
    answers = run(function, world, *args, timeout=timeout)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


@cache
def _forks() -> Any:
    """The interpreter that forks; it ends with this process, which holds its standard input."""
    forks = subprocess.Popen(
        [sys.executable, __file__],
        env=_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        start_new_session=True,
    )
    atexit.register(forks.communicate)  # closes its input, and waits for it
    return forks


def _env() -> dict[str, str]:
    return {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}


def end_all(session: int) -> None:
    """End every process of a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def split(model: nn.Module, plan: Any = None, **degrees: Any) -> nn.Module:
    """`model.enable_parallelism`, on CPUs.

    Diffusers divides a rank by the number of accelerators, which is 0 here. For this call alone,
    there is one for each rank.
    """
    from diffusers import ContextParallelConfig
    from diffusers.utils import logging

    logging.set_verbosity_error()  # that it is experimental
    told = {} if plan is None else {"cp_plan": plan}
    with mock.patch("torch.accelerator.device_count", dist.get_world_size):
        model.enable_parallelism(config=ContextParallelConfig(**degrees), **told)
    return model


def degrees(mode: str) -> dict[str, Any]:
    """The arguments of `ContextParallelConfig` for "U2", "R4", "U2R2", "UA3" or "RA3"."""
    if mode[:2] in ("UA", "RA"):
        name = {"U": "ulysses", "R": "ring"}[mode[0]]
        return {f"{name}_degree": int(mode[2:]), f"{name}_anything": True}
    parts = mode.replace("R", " R").split()
    return {f"{ {'U': 'ulysses', 'R': 'ring'}[part[0]] }_degree": int(part[1:]) for part in parts}


def known(modes: tuple[str, ...]) -> tuple[str, ...]:
    """Those modes that the installed diffusers has: the oldest knows one degree, and it divides."""
    from diffusers import ContextParallelConfig

    def is_known(mode: str) -> bool:
        try:
            return bool(ContextParallelConfig(**degrees(mode)))
        except (TypeError, ValueError):
            return False

    return tuple(filter(is_known, modes))


def _lead(function: Any, world: int, folder: str, timeout: int, env: dict[str, str]) -> None:
    """Fork the ranks, in a session of their own, and wait for them. Does not return."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    said = os.open(Path(folder, "said"), os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            _rank(rank, world, function, folder, timeout)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    os._exit(0)


def _rank(rank: int, world: int, function: Any, folder: str, timeout: int) -> None:
    torch.set_num_threads(1)
    args = pickle.loads(Path(folder, "args").read_bytes())
    dist.init_process_group(
        "cpu:gloo",  # with "gloo" alone, diffusers' `*_anything` may look for a GPU
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    try:
        answer = function(rank, *args)
    except Exception as error:
        traceback.print_exc()
        answer = error
    file = Path(folder, f"{rank}.part")
    try:
        file.write_bytes(pickle.dumps(answer))
    except Exception:
        file.write_bytes(pickle.dumps(RuntimeError(f"{type(answer).__name__}: {answer}")))
    file.rename(Path(folder, str(rank)))
    os._exit(0)


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "examples")]
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is imported may print
    for line in sys.stdin:
        call = json.loads(line)
        place, name = call["function"].split(":")
        called = getattr(importlib.import_module(place), name)
        leader = os.fork()
        if not leader:
            _lead(called, **{key: call[key] for key in ("world", "folder", "timeout", "env")})
        print(leader, file=replies)
        os.waitpid(leader, 0)
        print("ended", file=replies)
