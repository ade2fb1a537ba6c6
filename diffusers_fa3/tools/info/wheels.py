"""The FlashAttention-3 wheels that there are, and what each of them needs of a machine."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers_fa3.tools.info.machine import MachineFacts


@dataclass(frozen=True)
class Wheel:
    """One release of a package with Hopper kernels, for Linux on x86-64."""

    requirement: str
    cuda: int
    """The major release of CUDA that its binary is linked to."""
    torch: tuple[int, ...]
    """The oldest release of torch, or the only one."""
    exact: bool = False
    """Whether that release of torch is the only one: the binary has no stable ABI."""
    what: str = ""

    def why_not(self, machine: MachineFacts) -> str:
        """What keeps this wheel from a machine with a Hopper GPU; empty if it fits."""
        reasons = []
        if machine.platform != "Linux x86_64":
            reasons.append(f"is for Linux x86_64; this is {machine.platform}")
        if machine.cuda_major != self.cuda:
            reasons.append(f"needs a torch for CUDA {self.cuda}; this one is for {machine.cuda}")
        release = machine.torch_release
        needed = ".".join(map(str, self.torch))
        if self.exact and release != self.torch:
            reasons.append(f"needs torch {needed}; got {machine.torch}")
        elif release < self.torch:
            reasons.append(f"needs torch {needed} or newer; got {machine.torch}")
        return "; ".join(reasons)


NO_FP16 = "bf16 and float8, no fp16, no window, no backward"

WHEELS = (
    Wheel("tokenspeed-fa3", 13, (2, 9), what="fp16, bf16, float8, window; no softcap, no backward"),
    Wheel("fa3-fwd==0.0.3", 13, (2, 11), what=NO_FP16),
    Wheel("fa3-fwd==0.0.2", 12, (2, 10), what=NO_FP16),
    Wheel("fa3-fwd==0.0.1", 12, (2, 9), what=NO_FP16),
    Wheel("sglang-kernel==0.4.10", 13, (2, 14, 1), True, "every feature but backward"),
    Wheel("sgl-kernel==0.3.21", 12, (2, 9, 1), True, "every feature but backward"),
)
"""In order of preference."""

FROM_SOURCE = (
    "git clone https://github.com/Dao-AILab/flash-attention"
    " && cd flash-attention/hopper && python setup.py install"
)
"""Needs CUDA's compiler, 12.3 or newer, and long; the only build that has a backward here."""


def fitting(machine: MachineFacts) -> list[Wheel]:
    """The wheels that a machine with a Hopper GPU can use, the best one first."""
    return [wheel for wheel in WHEELS if not wheel.why_not(machine)]
