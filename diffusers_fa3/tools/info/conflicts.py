"""What in this process or environment gets in the way: only what was seen, nothing guessed."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import BuiltinFunctionType
from typing import Any

from torch.nn import functional as F

from diffusers_fa3.kernels import PROVIDERS
from diffusers_fa3.tools.info.machine import version_of
from diffusers_fa3.tools.info.patches import module_of, patched_in_diffusers

KNOWN = {
    "cache_dit": "cache-dit",
    "xfuser": "xDiT",
    "sageattention": "SageAttention",
    "para_attn": "ParaAttention",
}
"""Modules of packages that replace attention or models' forwards."""

NAMED_BESIDE = ("flash_attn_config", "flash_attn_3", "fa3_fwd_config")
"""Modules of kernels' packages besides those that are imported."""


@dataclass(frozen=True)
class Conflict:
    """One thing that was seen."""

    kind: str
    """sdpa, torch_impl, backend, distributions, namespace, patch or loaded."""
    subject: str
    """What it concerns: a function, a backend, a module or a package."""
    text: str
    command: str = ""
    """What to type; empty if there is nothing to type."""


def find_conflicts() -> tuple[Conflict, ...]:
    """All conflicts of this process and its environment."""
    patches = patched_in_diffusers()
    replaced = [*sdpa_replaced(F.scaled_dot_product_attention)]
    return (
        *replaced,
        *_torch_impl(),
        *backend_active(_active_backend()),
        *modules_with_two_owners(_modules(), importlib.metadata.packages_distributions()),
        *namespace_taken(version_of("xformers"), find_spec("flash_attn_interface") is not None),
        *patches_seen(patches),
        *loaded_only({*patches, *(conflict.subject.partition(".")[0] for conflict in replaced)}),
    )


def sdpa_replaced(function: Any) -> Iterator[Conflict]:
    """Whether PyTorch's attention is a function of somebody else's."""
    if isinstance(function, BuiltinFunctionType):
        return
    name = f"{module_of(function)}.{getattr(function, '__qualname__', type(function).__name__)}"
    yield Conflict(
        "sdpa",
        name,
        f"F.scaled_dot_product_attention is {name}, not PyTorch's. The default attention and the "
        "reference call it, for every model of this process. Such functions may ignore masks",
    )


def backend_active(name: str) -> Iterator[Conflict]:
    """Whether the process-wide backend of diffusers is another than the native one."""
    if name not in ("native", "fa3", ""):  # "fa3" is ours, by `register()`
        yield Conflict(
            "backend",
            name,
            f'the attention backend of diffusers is "{name}" for the whole process, set by '
            "set_attention_backend on some model, attention_backend(...) or "
            "DIFFUSERS_ATTN_BACKEND. Models that are not switched use it",
        )


def modules_with_two_owners(
    modules: Iterable[str], owners: Mapping[str, Iterable[str]]
) -> Iterator[Conflict]:
    """Modules of which two distributions have the same files: the one installed last won."""
    for module in modules:
        names = sorted(dict.fromkeys(owners.get(module, ())))
        files = {name: _files(name, module) for name in names}
        shared = _in_several(files.values())
        if len(names) < 2 or (all(files.values()) and not shared):
            continue  # as flash-attn and flash-attn-4, which share only a folder
        which = f" ({', '.join(sorted(shared)[:3])})" if shared else ""
        yield Conflict(
            "distributions",
            module,
            f"{' and '.join(names)} both install {module}{which}: the files of the one that was "
            "installed last are there. Uninstall both, and install one of them",
            f"pip uninstall {' '.join(names)}",
        )


def namespace_taken(xformers: str, flash_attn_3: bool) -> Iterator[Conflict]:
    """Whether xformers registers the ops of FlashAttention-3 under the same name."""
    numbers = [int(part) for part in xformers.split(".")[:3] if part.isdecimal()]
    if flash_attn_3 and numbers in ([0, 0, 33], [0, 0, 34]):
        yield Conflict(
            "namespace",
            "flash_attn_3",
            f"xformers {xformers} registers torch.ops.flash_attn_3 itself; in a process that "
            "imports it, the installed FlashAttention-3 cannot load",
            "pip install 'xformers>=0.0.35'",
        )


def patches_seen(patches: Mapping[str, list[str]]) -> Iterator[Conflict]:
    """What packages put in the place of diffusers' functions."""
    for package, replaced in patches.items():
        more = f" and {len(replaced) - 3} more" if replaced[3:] else ""
        yield Conflict(
            "patch",
            package,
            f"functions of {KNOWN.get(package, package)} are in the place of diffusers' own: "
            f"{', '.join(replaced[:3])}{more}",
        )


def loaded_only(seen: Iterable[str], modules: Iterable[str] = sys.modules) -> Iterator[Conflict]:
    """Known packages that are loaded, and of which no patch was seen."""
    for module, name in KNOWN.items():
        if module in modules and module not in seen:
            yield Conflict(
                "loaded",
                module,
                f"{name} is loaded; no function of PyTorch or diffusers was seen replaced by it. "
                "Models that it changed one by one are not seen here",
            )


def _torch_impl() -> Iterator[Conflict]:
    import torch.nn.attention

    current: Callable[[], str | None] = getattr(
        torch.nn.attention, "current_flash_attention_impl", lambda: None
    )
    name = current()
    if name is not None:
        yield Conflict(
            "torch_impl",
            name,
            f'PyTorch\'s flash attention is "{name}" for the whole process, by '
            "activate_flash_attention_impl: the default attention and torch_varlen use it",
        )


def _active_backend() -> str:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backend = _AttentionBackendRegistry._active_backend
    return str(getattr(backend, "value", backend) or "")


def _modules() -> list[str]:
    imported = (module.partition(".")[0] for p in PROVIDERS for module in p.modules)
    return [name for name in dict.fromkeys((*imported, *NAMED_BESIDE)) if name != "torch"]


def _files(distribution: str, module: str) -> set[str]:
    """The files of a distribution that belong to a module; empty if it lists none."""
    files = importlib.metadata.distribution(distribution).files or ()
    paths = (path.as_posix() for path in files)
    return {path for path in paths if path.partition("/")[0].partition(".")[0] == module}


def _in_several(sets: Iterable[set[str]]) -> set[str]:
    once: set[str] = set()
    twice: set[str] = set()
    for files in sets:
        twice |= once & files
        once |= files
    return twice
