"""The record of each switched layer: what the user asked for, and how its calls were served."""

from __future__ import annotations

import functools
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import count
from logging import WARNING
from typing import Any, Literal, cast, get_args

import torch
from diffusers.utils.logging import get_verbosity

from diffusers_fa3.errors import FA3Error, FallbackWarning, InputError, KernelUnavailableError
from diffusers_fa3.kernels import (
    AUTOMATIC,
    KernelChoice,
    check_choice,
    note_declined,
    while_tracing,
)
from diffusers_fa3.parallel import Home

Fallback = Literal["warn", "error", "silent"]

KERNEL_VARIABLE, FALLBACK_VARIABLE = "DIFFUSERS_FA3_KERNEL", "DIFFUSERS_FA3_FALLBACK"
VARIABLES = (KERNEL_VARIABLE, FALLBACK_VARIABLE)
"""Environment variables: the kernel's name and `fallback`, where a call gives none."""


@contextmanager
def _naming(variable: str) -> Iterator[None]:
    """Name the environment variable, if any, in an error about its value."""
    try:
        yield
    except (InputError, KernelUnavailableError) as error:
        if not variable:
            raise
        raise type(error)(f"{variable}={os.environ.get(variable)}: {error}") from error


@while_tracing
def warnings_are_wanted() -> bool:
    """Whether diffusers' verbosity lets warnings through: `diffusers.utils.logging`."""
    return get_verbosity() <= WARNING


@dataclass(frozen=True)
class Settings:
    """The user's options, shared by the layers that were switched together."""

    kernel: KernelChoice = "auto"
    fallback: Fallback = "warn"
    warned: set[tuple[str, str]] = field(default_factory=set, init=False, compare=False)
    """(processor class, reason) of each warning given so far."""
    switch_id: int = field(default_factory=count(1).__next__, init=False, compare=False)
    """The number under which compiled graphs count calls, since they cannot count on a layer."""

    @classmethod
    def asked(cls, kernel: KernelChoice | None, fallback: Fallback | None) -> Settings:
        """The options that were given, checked; for None, those of the environment.

        Raises:
            KernelUnavailableError: the kernel is unknown or not installed.
            InputError: an unknown `fallback`.
        """
        with _naming(KERNEL_VARIABLE if kernel is None else ""):
            chosen = (os.environ.get(KERNEL_VARIABLE) or "auto") if kernel is None else kernel
            check_choice(chosen)
        with _naming(FALLBACK_VARIABLE if fallback is None else ""):
            told = (os.environ.get(FALLBACK_VARIABLE) or "warn") if fallback is None else fallback
            if told not in get_args(Fallback):
                raise InputError(f"fallback is one of {get_args(Fallback)}; got {told!r}")
        return cls(chosen, cast(Fallback, told))

    def options(self) -> dict[str, Any]:
        """The options that the user can set, by name."""
        return {option.name: getattr(self, option.name) for option in fields(self) if option.init}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy as a switch of its own, with the same options and a new `switch_id`."""
        return functools.partial(Settings, **self.options()), ()


@dataclass(eq=False)
class LayerRecord:
    """A switched layer's own processor, and the counts of its attention calls."""

    processor: Any
    """None for diffusers' process-wide backend, which knows no layers, and for a request."""
    settings: Settings
    name: str = ""
    pack_queries: bool = False
    """Whether padded tokens are left out as queries too."""
    component: str | None = None
    """The component of the pipeline that the layer is in, "" for a model that was switched by
    itself; None for a processor that was wrapped by hand."""
    home: Home | None = None
    """The model that the layer is in; None for a processor that was wrapped by hand."""
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Calls that a kernel served, by kernel and route."""
    fallbacks: Counter[str] = field(default_factory=Counter)
    """Calls that the default attention served, by reason."""
    choices: Counter[str] = field(default_factory=Counter)
    """With `kernel="fastest"`: calls by who was the fastest, and by what lead."""
    skipped: int = 0
    """Runs in which the processor, which made attention calls before, made none."""
    plans_made: int = 0
    plans_reused: int = 0
    model: tuple[int, str] | None = field(init=False)
    """Tells the models that were switched apart; None for processors wrapped by hand."""

    def __post_init__(self) -> None:
        by_hand = self.component is None
        self.model = None if by_hand else (self.settings.switch_id, str(self.component))

    def decline(self, reason: str, error: FA3Error) -> None:
        """Count a call that the default attention serves; raise or warn as the user asked."""
        refused = (
            isinstance(error, KernelUnavailableError) and self.settings.kernel not in AUTOMATIC
        )
        if refused or self.settings.fallback == "error":
            raise error
        if torch.compiler.is_compiling():
            warn = self.settings.fallback == "warn" and warnings_are_wanted()
            note_declined(self.settings.switch_id, reason, warn)
            return
        self.fallbacks[reason] += 1
        warning = (type(self.processor).__name__, reason)
        new = warning not in self.settings.warned
        if self.settings.fallback == "warn" and new and warnings_are_wanted():
            self.settings.warned.add(warning)
            warnings.warn(
                f"{self}: the default attention serves: {reason}", FallbackWarning, stacklevel=2
            )

    def __str__(self) -> str:
        own = [] if self.processor is None else [type(self.processor).__name__]
        return " of ".join([*own, *filter(None, [self.name])])
