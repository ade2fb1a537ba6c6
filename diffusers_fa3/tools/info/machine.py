"""The machine and its software: GPUs, driver, torch, Python and the packages that matter here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

PACKAGES = (
    *("diffusers", "transformers", "accelerate", "peft", "triton", "kernels", "xformers"),
    *("cache-dit", "xfuser", "sageattention", "para-attn", "nvidia-cutlass-dsl"),
)
"""Distributions whose versions are shown; those of kernels are shown with the kernels."""

DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class GPU:
    """One CUDA device."""

    name: str
    capability: tuple[int, int]
    memory_gib: float


@dataclass(frozen=True)
class MachineFacts:
    """What kernels depend on. Empty strings and None: there is none."""

    platform: str
    """System and processor, e.g. "Linux x86_64"."""
    libc: str
    python: str
    torch: str
    cuda: str
    """The CUDA release that torch is built for."""
    rocm: str
    """The ROCm release that torch is built for."""
    cxx11_abi: bool
    """The C++ ABI of torch, which binaries without a stable ABI must share."""
    cudnn: int | None
    driver: str
    """The NVIDIA driver, whether or not torch can use it."""
    gpus: tuple[GPU, ...] = ()
    current: int = 0
    """The number of the current CUDA device."""
    packages: tuple[tuple[str, str], ...] = ()
    """Name and version of those of `PACKAGES` that are installed."""
    variables: tuple[tuple[str, str], ...] = ()
    """Name and value of those that are set of the variables that `enable_fa3` reads."""

    @property
    def gpu(self) -> GPU | None:
        """The current CUDA device."""
        return self.gpus[self.current] if self.gpus else None

    @property
    def torch_release(self) -> tuple[int, ...]:
        """Of torch "2.13.0+cpu": (2, 13, 0)."""
        return tuple(map(int, re.findall(r"\d+", self.torch.partition("+")[0])[:3]))

    @property
    def cuda_major(self) -> int | None:
        """Of CUDA "12.8": 12."""
        return int(self.cuda.partition(".")[0]) if self.cuda else None


def read_facts() -> MachineFacts:
    """The facts of this machine and this process. Loads no kernel."""
    from diffusers_fa3.layers import VARIABLES  # with diffusers

    has_cuda = torch.cuda.is_available()
    return MachineFacts(
        platform=f"{platform.system()} {platform.machine()}",
        libc=" ".join(platform.libc_ver()).strip(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        rocm=getattr(torch.version, "hip", None) or "",
        cxx11_abi=torch.compiled_with_cxx11_abi(),
        cudnn=torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # torch gives it no types
        driver=read_driver(),
        gpus=tuple(map(_gpu, range(torch.cuda.device_count()))) if has_cuda else (),
        current=torch.cuda.current_device() if has_cuda else 0,
        packages=tuple((name, got) for name in PACKAGES if (got := version_of(name))),
        variables=tuple((name, os.environ[name]) for name in VARIABLES if name in os.environ),
    )


def version_of(distribution: str) -> str:
    """The version of an installed distribution; empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def driver_in(text: str) -> str:
    """The driver's release in what the kernel module or `nvidia-smi` says; empty if none."""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found.group() if found else ""


def read_driver() -> str:
    """The release of the NVIDIA driver, also where torch cannot use it."""
    if DRIVER_FILE.exists():
        return driver_in(DRIVER_FILE.read_text())
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # not there, or of no use
        return ""
    return driver_in(done.stdout)


def _gpu(index: int) -> GPU:
    found = torch.cuda.get_device_properties(index)
    return GPU(found.name, (found.major, found.minor), round(found.total_memory / 2**30, 1))
