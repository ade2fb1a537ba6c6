"""Each kernel of the package: whether it is accepted here, and what its build can do."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch

from diffusers_fa3.kernels import PROVIDERS, Kernel, Provider, available_kernels, read_flags

FLAGS = {"flash_attn_3": "flash_attn_config", "fa3_fwd": "fa3_fwd_config"}
"""The module with the flags of a build, for those kernels whose packages have one."""

UNJUDGED = ("not loaded",)
"""The reasons of an installed kernel before anybody loaded it."""


@dataclass(frozen=True)
class Build:
    """What a loaded kernel can serve."""

    archs: tuple[str, ...]
    dtypes: tuple[str, ...]
    max_head_dim: int
    head_dim_multiple: int
    head_dims_differ: bool
    dense: bool
    varlen: bool
    seqused_k: bool
    window: bool
    softcap: bool
    float8: bool
    backward: bool
    kvcache: bool
    page_table: bool
    lse: bool
    out: str
    """ "native": the kernel writes into the caller's `out`; "copy": its result is copied."""


@dataclass(frozen=True)
class KernelFacts:
    """One kernel on this machine."""

    name: str
    accepted: bool
    reasons: tuple[str, ...]
    """Every reason why it cannot serve here; empty if it is accepted."""
    installed: bool
    """Whether its modules are there; whether they load is another matter."""
    version: str
    install: str
    only_by_name: str
    """Why "auto" leaves it out; empty if it does not."""
    distributions: tuple[tuple[str, str], ...] = ()
    """Name and version of each distribution that has the module."""
    build: Build | None = None
    """None: it was not loaded, since it is not installed, needs a CUDA device, or fails."""
    build_flags: Mapping[str, bool] = field(default_factory=dict)
    """The flags that the package ships; empty if it ships none."""

    @property
    def disabled(self) -> list[str]:
        """The features that the flags leave out."""
        off = (name for name, value in self.build_flags.items() if value and "DISABLE" in name)
        return [name.rpartition("DISABLE_")[2] for name in off]


def read_kernels(device: torch.device | str | None = None) -> tuple[KernelFacts, ...]:
    """Every kernel, as `available_kernels` judges it, and what its package says of itself."""
    owners = importlib.metadata.packages_distributions()
    rows = {row.name: row for row in available_kernels(device)}
    found = []
    for provider in PROVIDERS:
        facts, row = unjudged(provider, owners), rows[provider.name]
        facts = replace(facts, accepted=row.accepted, reasons=row.reasons)
        if row.out:  # loaded by `available_kernels`, so it is safe to load
            facts = replace(facts, version=row.version, build=build_of(provider.load()))
        found.append(facts)
    return tuple(found)


def unjudged(provider: Provider, owners: Mapping[str, list[str]]) -> KernelFacts:
    """What is known of a kernel without loading it; it counts as rejected."""
    installed = is_installed(provider)
    found = distributions_of(provider.modules, owners) if installed else ()
    return KernelFacts(
        name=provider.name,
        accepted=False,
        reasons=UNJUDGED if installed else ("not installed",),
        installed=installed,
        version=", ".join(f"{name} {version}" for name, version in found),
        install=provider.install,
        only_by_name=provider.on_request,
        distributions=found,
        build_flags=flags_of(provider.name) if installed else {},
    )


def is_installed(provider: Provider) -> bool:
    """Whether the modules of a kernel can be found."""
    return all(find_spec(module) is not None for module in provider.modules)


def distributions_of(
    modules: Iterable[str], owners: Mapping[str, list[str]]
) -> tuple[tuple[str, str], ...]:
    """Name and version of the distributions that own modules; torch, where a kernel needs none."""
    tops = dict.fromkeys(module.partition(".")[0] for module in modules) or {"torch": None}
    names = dict.fromkeys(name for top in tops for name in owners.get(top, ()))
    return tuple((name, importlib.metadata.version(name)) for name in names)


def flags_of(kernel: str) -> dict[str, bool]:
    """The flags that a kernel's package was built with, from its config module."""
    try:
        return dict(read_flags(FLAGS[kernel])) if kernel in FLAGS else {}
    except Exception:  # a broken package; that it does not load is told by its kernel's row
        return {}


def build_of(kernel: Kernel) -> Build:
    """What a loaded kernel says of itself."""
    limits = kernel.limits
    return Build(
        archs=limits.archs,
        dtypes=tuple(sorted(str(dtype).removeprefix("torch.") for dtype in limits.dtypes)),
        max_head_dim=limits.max_head_dim,
        head_dim_multiple=limits.head_dim_multiple,
        head_dims_differ=limits.head_dims_differ,
        dense=limits.dense,
        varlen=limits.varlen,
        seqused_k=limits.seqused_k,
        window=limits.window,
        softcap=limits.softcap,
        float8=any(dtype.itemsize == 1 for dtype in limits.dtypes),
        backward=limits.backward,
        kvcache=limits.kvcache,
        page_table=limits.page_table,
        lse=limits.lse,
        out=kernel.out,
    )


def build_from(facts: Mapping[str, Any]) -> Build:
    """A build as it was written to JSON by another process."""
    lists = {name: tuple(facts[name]) for name in ("archs", "dtypes")}
    return Build(**{**facts, **lists})
