"""The report: all facts of a machine, and of a model if one is given."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_fa3.kernels import PROVIDERS
from diffusers_fa3.tools.info.advice import Advice, advise
from diffusers_fa3.tools.info.builds import UNJUDGED, KernelFacts, read_kernels, unjudged
from diffusers_fa3.tools.info.choices import Choice, current_device, read_choices
from diffusers_fa3.tools.info.conflicts import Conflict, find_conflicts
from diffusers_fa3.tools.info.machine import MachineFacts, read_facts
from diffusers_fa3.tools.info.probe import TIMEOUT_S, Probe, probe_kernels

if TYPE_CHECKING:
    from diffusers_fa3.tools.info.model import ModelFacts

SCHEMA = 1
"""Of `to_dict`. A new key does not change it; a key that goes, or means something else, does."""


@dataclass(frozen=True)
class MachineReport:
    """What `machine_report` found. `str()` gives tables, `to_dict()` a dict ready for JSON."""

    diffusers_fa3: str
    machine: MachineFacts
    kernels: tuple[KernelFacts, ...]
    choices: tuple[Choice, ...]
    """Empty if a kernel that "auto" would load ends its process: see `advice`."""
    advice: tuple[Advice, ...]
    conflicts: tuple[Conflict, ...]
    probes: tuple[Probe, ...] | None = None
    """None: not asked for."""
    model: ModelFacts | None = None
    """None: not asked for."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings, numbers and bools; see `docs/info.md`."""
        facts = {"schema": SCHEMA, **_plain(asdict(self))}
        facts["machine"]["packages"] = dict(facts["machine"]["packages"])
        facts["machine"]["variables"] = dict(facts["machine"]["variables"])
        for kernel in facts["kernels"]:
            kernel["distributions"] = dict(kernel["distributions"])
        if facts["model"] is not None:
            facts["model"]["skipped"] = dict(facts["model"]["skipped"])
        return facts

    def __str__(self) -> str:
        from diffusers_fa3.tools.info.show import plain

        return plain(self)


def machine_report(
    model: str | Path | None = None, *, probe: bool = False, probe_timeout_s: float = TIMEOUT_S
) -> MachineReport:
    """What this machine has, what "auto" takes on it, and what is in the way.

    Kernels are loaded, as a call would load them; those that serve only by name are not.

    Args:
        model: a local folder with a diffusers model or pipeline. Its layers are read from the
            configuration; no weights are loaded.
        probe: load and launch each installed kernel in a process of its own first. A kernel that
            ends that process as it loads is then not loaded in this one.
        probe_timeout_s: seconds after which such a process is ended.

    Raises:
        InputError: `model` is no such folder.

    Example:
        >>> from diffusers_fa3.tools.info import machine_report
        >>> report = machine_report()
        >>> [kernel.name for kernel in report.kernels][0]
        'flash_attn_3'
        >>> report.to_dict()["schema"]
        1
    """
    machine = read_facts()
    probes = probe_kernels(timeout_s=probe_timeout_s) if probe else None
    unsafe = [found.kernel for found in probes or () if found.unsafe_to_load]
    # "auto" would load what ends the process, and so would these two.
    kernels = _unloaded() if unsafe else read_kernels()
    choices = () if unsafe else read_choices(current_device())
    kernels = with_probes(kernels, probes or ())
    facts = None
    if model is not None:
        from diffusers_fa3.tools.info.model import read_model

        facts = read_model(model, ask=not unsafe)
    return MachineReport(
        diffusers_fa3=_own_version(),
        machine=machine,
        kernels=kernels,
        choices=choices,
        advice=(*of_probes(probes or (), kernels), *advise(machine, kernels)),
        conflicts=find_conflicts(),
        probes=probes,
        model=facts,
    )


def with_probes(
    kernels: tuple[KernelFacts, ...], probes: tuple[Probe, ...]
) -> tuple[KernelFacts, ...]:
    """The kernels, with what their probes found out: a fault rejects a kernel."""
    found = {probe.kernel: probe for probe in probes}
    return tuple(_with_probe(kernel, found.get(kernel.name)) for kernel in kernels)


def _with_probe(kernel: KernelFacts, probe: Probe | None) -> KernelFacts:
    if probe is None:
        return kernel
    kernel = replace(kernel, build=kernel.build or probe.build)
    if probe.fault is None:
        if kernel.reasons != UNJUDGED:
            return kernel
        skipped = tuple(dict.fromkeys(s.detail for s in probe.steps if s.outcome == "skipped"))
        launched = any(step.outcome == "ok" and step.step != "load" for step in probe.steps)
        return replace(kernel, accepted=launched, reasons=() if launched else skipped)
    step, outcome, detail = probe.fault.step, probe.fault.outcome, probe.fault.detail
    reason = f"in a process of its own, {step}: {outcome}, {detail}"
    known = () if kernel.reasons == UNJUDGED else kernel.reasons
    return replace(kernel, accepted=False, reasons=(*known, reason))


def of_probes(probes: tuple[Probe, ...], kernels: tuple[KernelFacts, ...]) -> tuple[Advice, ...]:
    """What to do about kernels that end their process."""
    by_name = {kernel.name: kernel for kernel in kernels}
    advice = []
    for probe in probes:
        fault = probe.fault
        if fault is None or fault.outcome not in ("ended", "timeout"):
            continue
        names = " ".join(name for name, _ in by_name[probe.kernel].distributions)
        advice.append(
            Advice(
                f"{probe.kernel} ends its process or hangs ({fault.step}: {fault.detail}), and "
                '"auto" may take it. Uninstall it, or ask for another kernel by name',
                f"pip uninstall {names}" if names and names != "torch" else "",
            )
        )
    return tuple(advice)


def _unloaded() -> tuple[KernelFacts, ...]:
    owners = importlib.metadata.packages_distributions()
    return tuple(unjudged(provider, owners) for provider in PROVIDERS)


def _own_version() -> str:
    import diffusers_fa3

    return diffusers_fa3.__version__


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
