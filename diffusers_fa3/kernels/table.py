"""The result of `available_kernels`: a row per provider, printed as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffusers_fa3.kernels.contract import Kernel, Provider


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One provider, judged on one machine."""

    name: str
    version: str
    """Distribution and version; empty if the kernel was not loaded."""
    accepted: bool
    reasons: tuple[str, ...]
    """Why the kernel is rejected; empty if it is accepted."""
    out: Literal["native", "copy", ""]
    """How `out` is served; empty if the kernel was not loaded."""
    install: str
    """The command that installs the package."""

    @classmethod
    def of(cls, provider: Provider, kernel: Kernel, reasons: Sequence[str]) -> KernelRow:
        """The row of a loaded kernel; `reasons` is empty if it is accepted."""
        return cls(
            provider.name,
            kernel.version,
            not reasons,
            tuple(reasons),
            kernel.out,
            provider.install,
        )

    @classmethod
    def rejected(cls, provider: Provider, reason: str) -> KernelRow:
        """The row of a provider that was not loaded."""
        return cls(provider.name, "", False, (reason,), "", provider.install)

    def __str__(self) -> str:
        return " ".join(cell for cell in self._cells() if cell)

    def _cells(self) -> tuple[str, str, str, str]:
        answer = "yes" if self.accepted else "no"
        words = f"out: {self.out}" if self.accepted else "; ".join(self.reasons)
        if not self.accepted and not self.version:
            words += f" ({self.install})"
        return self.name, answer, self.version, words


class KernelTable(tuple[KernelRow, ...]):
    """Rows in order of preference."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("kernel", "usable", "version", "why not, or how `out` is served")]
        rows += [row._cells() for row in self]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]
            ).rstrip()
            for row in rows
        )
