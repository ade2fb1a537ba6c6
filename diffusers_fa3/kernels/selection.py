"""Which kernel serves a call: decided once per kind of call, with a reason for every refusal."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import MethodType
from typing import Any

from diffusers_fa3.errors import InputError, KernelUnavailableError
from diffusers_fa3.kernels.contract import (
    Kernel,
    Machine,
    Provider,
    Request,
    device_words,
    rejection_reasons,
)
from diffusers_fa3.kernels.public_function import wrap_callable
from diffusers_fa3.kernels.table import KernelRow, KernelTable

KernelChoice = str | Callable[..., Any]
"""`"auto"`, `"fastest"`, a name from `available_kernels()`, or a function with FlashAttention's
arguments."""

AUTOMATIC = ("auto", "fastest")
"""Choices that name no kernel. Selection knows them as one: only `fastest.py` tells them apart."""

CALLABLES_KEPT = 16
"""The most functions given as `kernel` whose wrapping is kept; a model uses one."""


@dataclass(frozen=True)
class _Refusal:
    message: str
    summary: str
    cause: Exception | None = None

    def error(self) -> KernelUnavailableError:
        """A new error each time: a kept error would collect the traceback of every raise."""
        error = KernelUnavailableError(self.message, self.summary)
        error.__cause__ = self.cause
        return error


_Answers = dict[tuple[Request, Machine], Kernel | _Refusal]


class Selector:
    """Chooses among providers in order of preference; caches loaded kernels and decisions."""

    def __init__(self, providers: Iterable[Provider]) -> None:
        self._providers = {provider.name: provider for provider in providers}
        self._loaded: dict[str, Kernel | Exception] = {}
        self._answers: dict[tuple[Request, Machine, str], Kernel | _Refusal] = {}
        self._rivals: dict[tuple[Request, Machine], tuple[str, ...]] = {}
        self._callables: OrderedDict[tuple[int, int], tuple[Kernel, _Answers]] = OrderedDict()

    def select(self, request: Request, machine: Machine, kernel: KernelChoice = "auto") -> Kernel:
        """The kernel that serves a call.

        Args:
            request: what the call asks.
            machine: where the call runs, from `read_machine`.
            kernel: "auto", and "fastest" here, takes the first provider whose kernel can serve.
                With a name or a function, only that kernel may serve.

        Raises:
            KernelUnavailableError: no kernel can serve, or the kernel asked for cannot. The message
                has every reason. If the package asked for failed to load, its exception is the
                cause.
            InputError: `kernel` is neither a name nor a function.
        """
        if isinstance(kernel, str):
            answer = self._answers.get((request, machine, kernel))
            if answer is None:
                decide = self._decide_auto if kernel in AUTOMATIC else self._decide_named
                answer = self._answers[request, machine, kernel] = decide(request, machine, kernel)
        else:
            wrapped, answers = self._wrapped(kernel)
            answer = answers.get((request, machine))
            if answer is None:
                answer = answers[request, machine] = _judge(wrapped, request, machine)
        if isinstance(answer, Kernel):
            return answer
        raise answer.error()

    def check_choice(self, kernel: KernelChoice) -> None:
        """Raise KernelUnavailableError if `kernel` cannot be loaded or called at all."""
        if not isinstance(kernel, str):
            self._wrapped(kernel)
        elif kernel not in AUTOMATIC:
            self.kernel_named(kernel)

    def rivals(self, request: Request, machine: Machine) -> tuple[str, ...]:
        """The kernels that "auto" may take for a call, by name, the best one first."""
        names = self._rivals.get((request, machine))
        if names is None:
            offers = ((p.name, self._offer(p, request, machine)) for p in self._providers.values())
            names = tuple(name for name, offer in offers if isinstance(offer, Kernel))
            self._rivals[request, machine] = names
        return names

    def kernel_named(self, name: str) -> Kernel:
        """The loaded kernel of that name, even if it cannot serve on this machine.

        Raises:
            KernelUnavailableError: the name is unknown, or its package is not installed or fails to
                load.
        """
        found = self._find(name)
        if isinstance(found, _Refusal):
            raise found.error()
        return found

    def available(self, machine: Machine) -> KernelTable:
        """A row per provider, judged on `machine`. Providers on request are not loaded for it."""
        return KernelTable(self._row(provider, machine) for provider in self._providers.values())

    def _decide_auto(self, request: Request, machine: Machine, _: str) -> Kernel | _Refusal:
        headline = f"no kernel serves {_request_words(request)} on {device_words(machine)}"
        lines = [headline]
        for provider in self._providers.values():
            answer = self._offer(provider, request, machine)
            if isinstance(answer, Kernel):
                return answer
            lines.append(f"  {provider.name}: {answer}")
        lines.append(
            "Install a kernel that serves this (its line says how), or ask for one by name: "
            'kernel="reference" serves every call, in plain PyTorch'
        )
        return _Refusal("\n".join(lines), headline)

    def _offer(self, provider: Provider, request: Request, machine: Machine) -> Kernel | str:
        """What "auto" gets from one provider: its kernel, or the reason against it in one line."""
        if provider.on_request:
            return f'only by name, since {provider.on_request}: kernel="{provider.name}"'
        if provider.cuda and machine.capability is None:
            return "needs a CUDA device"
        if not provider.cuda and machine.device == "cuda":
            return "only by name on a CUDA device, where it is slower than the default attention"
        loaded = self._load(provider)
        if isinstance(loaded, Exception):
            return _failure_words(provider, loaded)
        answer = _judge(loaded, request, machine)
        return answer.summary if isinstance(answer, _Refusal) else answer

    def _decide_named(self, request: Request, machine: Machine, name: str) -> Kernel | _Refusal:
        found = self._find(name)
        if isinstance(found, _Refusal):
            return found
        answer = _judge(found, request, machine)
        if isinstance(answer, Kernel):
            return answer
        headline = (
            f'kernel "{name}" cannot serve {_request_words(request)} on {device_words(machine)}'
        )
        return _Refusal(
            f'{headline}\n  {name}: {answer.summary}\nSay kernel="auto" to take one that can',
            f"{headline}: {answer.summary}",
        )

    def _find(self, name: str) -> Kernel | _Refusal:
        provider = self._providers.get(name)
        if provider is None:
            known = ", ".join((*AUTOMATIC, *self._providers))
            words = f'no kernel is called "{name}"; kernel is one of {known}, or a function'
            return _Refusal(words, words)
        loaded = self._load(provider)
        if isinstance(loaded, Kernel):
            return loaded
        words = f'kernel "{name}" is {_failure_words(provider, loaded)}'
        return _Refusal(words, words, None if isinstance(loaded, _NotInstalled) else loaded)

    def _load(self, provider: Provider) -> Kernel | Exception:
        loaded = self._loaded.get(provider.name)
        if loaded is None:
            loaded = self._loaded[provider.name] = _try_to_load(provider)
        return loaded

    def _row(self, provider: Provider, machine: Machine) -> KernelRow:
        if _missing_module(provider) is None:
            if provider.cuda and machine.capability is None:
                return KernelRow.rejected(provider, "needs a CUDA device")
            if provider.on_request and provider.name not in self._loaded:
                return KernelRow.rejected(provider, f"only by name, since {provider.on_request}")
        loaded = self._load(provider)
        if isinstance(loaded, Exception):
            return KernelRow.rejected(provider, _reason(loaded))
        return KernelRow.of(provider, loaded, rejection_reasons(loaded.limits, machine, None))

    def _wrapped(self, function: Any) -> tuple[Kernel, _Answers]:
        """The wrapped kernel of `function`, and the decisions about it.

        The kernel holds `function` strongly, so that no other object can get its id.
        """
        if not callable(function):
            raise InputError(f"kernel must be a name or a function; got {function!r}")
        bound = isinstance(function, MethodType)
        key = (id(function.__func__), id(function.__self__)) if bound else (id(function), 0)
        known = self._callables.get(key)
        if known is None:
            known = self._callables[key] = (wrap_callable(function), {})
            if len(self._callables) > CALLABLES_KEPT:
                self._callables.popitem(last=False)
        return known


class _NotInstalled(ImportError):
    """A provider's module is not installed. A module that fails to load raises other errors."""


def _try_to_load(provider: Provider) -> Kernel | Exception:
    missing = _missing_module(provider)
    if missing is not None:
        return _NotInstalled(f"no module {missing}")
    try:
        return provider.load()
    except Exception as error:  # a broken binary may raise anything; the user is told
        return error


def _missing_module(provider: Provider) -> str | None:
    return next(
        (name for name in provider.modules if name not in sys.modules and find_spec(name) is None),
        None,
    )


def _judge(kernel: Kernel, request: Request, machine: Machine) -> Kernel | _Refusal:
    limits = kernel.limits
    reasons = "; ".join(rejection_reasons(limits, machine, request))
    if reasons:
        return _Refusal(
            f'kernel {kernel.name} cannot serve: {reasons}. Say kernel="auto" to take one that can',
            reasons,
        )
    if request.backward and limits.seqused_k and not limits.seqused_k_backward:
        return replace(kernel, limits=replace(limits, seqused_k=False))
    return kernel


def _failure_words(provider: Provider, error: Exception) -> str:
    words = _reason(error)
    lacking = isinstance(error, (_NotInstalled, KernelUnavailableError))
    return f"{words} ({provider.install})" if lacking else words


def _reason(error: Exception) -> str:
    if isinstance(error, _NotInstalled):
        return "not installed"
    if isinstance(error, KernelUnavailableError):
        return f"not usable: {error.summary}"
    first_line = next(iter(str(error).splitlines()), "")
    return f"installed but fails to load: {type(error).__name__}: {first_line}"


def _request_words(request: Request) -> str:
    sizes = str(request.head_dim)
    if request.head_dim_v != request.head_dim:
        sizes += f" (v: {request.head_dim_v})"
    features = ("window", "softcap", "lse", "backward", "kvcache")
    asked = ", ".join(name for name in features if getattr(request, name))
    dtype = str(request.dtype).removeprefix("torch.")
    return f"{dtype} at head size {sizes}" + (f" with {asked}" if asked else "")
