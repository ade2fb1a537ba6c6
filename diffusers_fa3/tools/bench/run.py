"""Measure all calls of a benchmark, and record what is needed to repeat it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import diffusers
import torch
from rich.progress import track

from diffusers_fa3.kernels import AUTOMATIC, available_kernels
from diffusers_fa3.tools.bench.cases import Case, mask_bytes
from diffusers_fa3.tools.bench.measure import measure
from diffusers_fa3.tools.bench.methods import diffusers_on
from diffusers_fa3.tools.bench.tables import Row
from diffusers_fa3.tools.bench.timing import measure_overhead


@dataclass(frozen=True)
class Results:
    """The measurements, the versions they were made with, and the cases that were skipped."""

    rows: tuple[Row, ...]
    skipped: dict[str, str]
    """Case name -> why the case was skipped."""
    versions: dict[str, str]
    overhead_us: float
    """Extra microseconds per call of a switched layer, without kernels."""
    overhead_noise_us: float
    """How far `overhead_us` is from that of a single round, typically."""


def run(
    cases: Sequence[Case], dtypes: Sequence[torch.dtype], device: str, kernel: str, rounds: int
) -> Results:
    """Measure every case at every dtype and share, with a progress bar."""
    about = versions(device, kernel)
    calls = [(case, share, dtype) for case in cases for dtype in dtypes for share in case.shares]
    rows, skipped = [], {}
    with torch.inference_mode(), diffusers_on(about["kernel"]):
        for case, share, dtype in track(calls, description="measuring"):
            needed, free = mask_bytes(case), _free_bytes(device)
            if needed > free:
                skipped[case.name] = f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
                continue
            rows.append(measure(case, share, dtype, device, about["kernel"], rounds))
        overhead, noise = measure_overhead(rounds)
    return Results(tuple(rows), skipped, about, overhead, noise)


def versions(device: str, kernel: str) -> dict[str, str]:
    """Device, versions and kernel, needed to repeat a figure; "auto" becomes one kernel here."""
    rows = [row for row in available_kernels(device) if kernel in (*AUTOMATIC, row.name)]
    used = next((row for row in rows if row.accepted), rows[0])
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "diffusers": diffusers.__version__,
        "kernel": f"fastest ({used.name})" if kernel == "fastest" else used.name,
        "kernel_version": used.version,
    }


def _free_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
