"""Start the ranks of a check as processes of their own, and end them all, whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from diffusers_fa3.errors import FA3Error, InputError

Answer = TypeVar("Answer")
Progress = Callable[[str], None]

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for another one. To load a large pipeline takes some ranks longer."""
LAST_WORDS = 0.5
"""Seconds in which a rank that died is found out, where another one complains of it."""
GRACE = 5
"""Seconds after which a process that was told to end is killed."""


class Rank(NamedTuple):
    """A process, and the end of its pipe that is here."""

    process: Any
    inbox: Connection


def on_ranks(
    work: Callable[[Any, torch.device, Progress], Answer],
    args: Any,
    ranks: int,
    device: str,
    on_progress: Progress,
    patience: timedelta = PATIENCE,
) -> Answer:
    """What `work(args, device, on_progress)` gives on rank 0 of so many new processes.

    `work` is a function of a module, which each process imports. There, torch.distributed is ready.
    No process is left when this returns or raises.

    Raises:
        InputError: the ranks cannot be started here; a rank died, or raised what this package does
            not raise.
        FA3Error, torch.OutOfMemoryError: as the first rank raised it.
    """
    _refuse(ranks, device)
    context = multiprocessing.get_context("spawn")
    started: list[Rank] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(ranks):
                inbox, outbox = context.Pipe(duplex=False)
                place = (rank, ranks, device, f"file://{folder}/rendezvous", patience)
                process = context.Process(
                    target=_be_rank, args=(outbox, place, work, args), daemon=True
                )
                started.append(Rank(process, inbox))
                process.start()
                outbox.close()  # so that the pipe ends with the process
            answer: Answer = _listen(started, on_progress)
            return answer
        finally:
            _end(started)


def _refuse(ranks: int, device: str) -> None:
    if not dist.is_available():
        raise InputError(
            "--ranks needs torch.distributed, which this build of torch lacks; install another "
            "build, or check without --ranks"
        )
    if device == "cuda" and ranks > torch.cuda.device_count():
        raise InputError(
            f"--ranks needs a CUDA device for each rank; got {ranks} ranks and "
            f"{torch.cuda.device_count()} devices. Give fewer ranks, or --device cpu"
        )


def _listen(started: list[Rank], on_progress: Progress) -> Any:
    """Pass progress on until rank 0 has its answer, or some rank has trouble."""
    inboxes = {rank.inbox: number for number, rank in enumerate(started)}
    while True:
        for inbox in wait(list(inboxes)):
            assert isinstance(inbox, Connection)
            number = inboxes[inbox]
            try:
                kind, told = inbox.recv()
            except EOFError:
                raise _death_of(number, started[number].process) from None
            if kind == "error":
                _blame_the_dead(started)
                raise told
            if kind == "answer":
                return told
            on_progress(told)


def _blame_the_dead(started: list[Rank]) -> None:
    """Raise if a rank died: what the others then raise is not the cause."""
    sentinels = {rank.process.sentinel: number for number, rank in enumerate(started)}
    for dead in wait(list(sentinels), LAST_WORDS):
        assert isinstance(dead, int)
        number = sentinels[dead]
        raise _death_of(number, started[number].process)


def _death_of(number: int, process: Any) -> InputError:
    process.join(GRACE)
    code = process.exitcode
    how = f"exit status {code}"
    if code is not None and code < 0:
        how = f"signal {signal.Signals(-code).name}"
    return InputError(
        f"every rank must live until the check is done; rank {number} ended with {how}. If the "
        "system ended it for want of memory, give fewer ranks, or ask for smaller pictures"
    )


def _end(started: list[Rank]) -> None:
    running = [rank.process for rank in started if rank.process.pid is not None]
    for process in running:
        process.terminate()
    for process in running:
        process.join(GRACE)
        if process.is_alive():
            process.kill()
            process.join()


def _be_rank(
    outbox: Connection,
    place: tuple[int, int, str, str, timedelta],
    work: Callable[[Any, torch.device, Progress], Any],
    args: Any,
) -> None:
    """What a rank's process does: its work, of which rank 0 tells; then it waits to be ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends its ranks itself
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    rank, ranks, device, rendezvous, patience = place
    try:
        where = _ready(rank, ranks, device)
        dist.init_process_group(
            # "cpu:", since diffusers gathers sizes on the CPU only if the name says so.
            "nccl" if device == "cuda" else "cpu:gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=ranks,
            timeout=patience,
        )

        def tell(stage: str) -> None:
            if rank == 0:
                outbox.send(("stage", stage))

        answer = work(args, where, tell)
        if rank == 0:
            outbox.send(("answer", answer))
    except Exception as error:
        known = isinstance(error, FA3Error | torch.OutOfMemoryError)
        words = f"every rank must end the check; rank {rank} raised {type(error).__name__}: {error}"
        outbox.send(("error", error if known else InputError(words)))
    threading.Event().wait()


def _ready(rank: int, ranks: int, device: str) -> torch.device:
    """Set a process up for its rank, and give the rank's device."""
    os.dup2(2, 1)  # what a library prints must not come into the command's JSON
    # With a lock of its own, tqdm makes a semaphore, of which Python warns where a signal ends us.
    import_module("tqdm").tqdm.set_lock(threading.RLock())
    if device == "cuda":
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else diffusers would split over the GPUs
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    return torch.device("cpu")


def _end_with_the_command() -> None:
    """End this process when that of the command is gone, however it ended."""
    command = multiprocessing.parent_process()
    assert command is not None
    with suppress(Exception):
        command.join()
    os._exit(1)
