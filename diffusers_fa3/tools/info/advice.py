"""What to type to get a better kernel on a machine: a pure function of its facts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diffusers_fa3.tools.info.builds import KernelFacts
from diffusers_fa3.tools.info.machine import MachineFacts
from diffusers_fa3.tools.info.wheels import FROM_SOURCE, WHEELS, fitting

FAST = ("flash_attn_3", "fa3_fwd", "sgl_kernel", "flash_attn_4", "torch_varlen", "flash_attn_2")
"""The kernels that "auto" may take on a GPU."""
HOPPER = "a Hopper GPU (compute capability 9.0: H100, H200, H20, GH200)"

TRAPS = (
    ("libcudart.so.", "it is built for another CUDA than torch, which is built for CUDA {cuda}"),
    ("torch_dtype_float8_e8m0fnu", "fa3-fwd 0.0.3 needs torch 2.11 or newer; got {torch}"),
    ("Only a single TORCH_LIBRARY", "two packages register the same ops, and only one can load"),
    ("undefined symbol", "it is built for another torch than {torch}"),
    ("common_ops", "sgl-kernel has no code for this GPU, or is built for another torch: {torch}"),
    ("No module named 'cutlass'", "nvidia-cutlass-dsl's .pth file is not read, as with --target"),
)
"""What a failure to load says, and what that means."""


@dataclass(frozen=True)
class Advice:
    """One thing to know or to do."""

    text: str
    command: str = ""
    """What to type; empty if there is nothing to type."""


def advise(machine: MachineFacts, kernels: Sequence[KernelFacts]) -> tuple[Advice, ...]:
    """What serves here, and what to install for more.

    Args:
        machine: from `read_facts`.
        kernels: from `read_kernels`, on the same machine.
    """
    accepted = {kernel.name: kernel for kernel in kernels if kernel.accepted}
    gpu = machine.gpu
    if gpu is None:
        found = _without_gpu(machine)
    elif gpu.capability == (9, 0):
        found = _on_hopper(machine, accepted)
    else:
        found = _on_others(machine, accepted)
    return (*found, *_of_failures(machine, kernels))


def _without_gpu(machine: MachineFacts) -> Iterator[Advice]:
    serves = '"auto" takes the reference, in plain PyTorch: right on every device, but not faster'
    yield Advice(f"FlashAttention-3 needs {HOPPER}; torch sees no CUDA device here. {serves}")
    if machine.rocm:
        yield Advice(f"this torch is built for ROCm {machine.rocm}; no kernel here is for AMD GPUs")
    elif machine.driver and not machine.cuda:
        # CUDA 13 needs driver 580.
        folder = "cu130" if int(machine.driver.partition(".")[0]) >= 580 else "cu126"
        yield Advice(
            f"there is an NVIDIA driver ({machine.driver}), but torch {machine.torch} is built "
            "without CUDA",
            f"pip install --force-reinstall torch --index-url "
            f"https://download.pytorch.org/whl/{folder}",
        )
    elif machine.cuda:
        yield Advice(
            f"torch is built for CUDA {machine.cuda}: see that there is a GPU and a driver, and "
            "that CUDA_VISIBLE_DEVICES hides nothing",
            "nvidia-smi",
        )


def _on_hopper(machine: MachineFacts, accepted: dict[str, KernelFacts]) -> Iterator[Advice]:
    ours = [kernel for name, kernel in accepted.items() if name in FAST[:3]]
    wheels = fitting(machine)
    if not ours and wheels:
        best, *others = wheels
        also = f" Or: {', '.join(wheel.requirement for wheel in others)}" if others else ""
        yield Advice(
            f"no FlashAttention-3 build serves here. {best.requirement} fits this machine "
            f"({best.what}).{also}",
            f"pip install '{best.requirement}'",
        )
    elif not ours:
        reasons = ". ".join(f"{wheel.requirement} {wheel.why_not(machine)}" for wheel in WHEELS[:4])
        yield Advice(
            f"no FlashAttention-3 build serves here, and no wheel fits. {reasons}. Change torch, "
            "or build from source with CUDA's compiler, 12.3 or newer",
            FROM_SOURCE,
        )
    else:
        yield Advice(f"FlashAttention-3 serves here: {', '.join(k.name for k in ours)}")
    if ours and not _any(ours, "float16"):
        better = [wheel for wheel in wheels if wheel.requirement == "tokenspeed-fa3"]
        yield Advice(
            f"{', '.join(k.name for k in ours)} takes no fp16: such calls are not on "
            "FlashAttention-3. Use bf16" + (", or install tokenspeed-fa3" if better else ""),
            "pip install tokenspeed-fa3" if better else "",
        )
    if ours and not any(kernel.build is not None and kernel.build.backward for kernel in ours):
        trains = [
            name
            for name, kernel in accepted.items()
            if kernel.build is not None and kernel.build.backward and name in FAST
        ]
        yield Advice(
            "no installed FlashAttention-3 build has a backward: training takes "
            f"{trains[0] if trains else 'the default attention'}. A build from source has one",
            FROM_SOURCE,
        )


def _on_others(machine: MachineFacts, accepted: dict[str, KernelFacts]) -> Iterator[Advice]:
    gpu = machine.gpu
    assert gpu is not None
    major, minor = gpu.capability
    here = f"this is {gpu.name}, of compute capability {major}.{minor}"
    fast = [name for name in accepted if name in FAST]
    serves = f"Here {fast[0]} serves" if fast else "Here PyTorch's attention serves"
    yield Advice(f"FlashAttention-3 is made for {HOPPER}; {here}. {serves}")
    if major >= 10 and "flash_attn_4" not in accepted:
        yield Advice("FlashAttention-4 is made for this GPU", "pip install flash-attn-4")
    elif major < 8:
        yield Advice("no kernel has code for GPUs before compute capability 8.0")
    elif "torch_varlen" not in accepted and machine.torch_release < (2, 12):
        yield Advice(
            "torch has FlashAttention-2 for packed tensors from 2.12 on, with all that is needed "
            f"here; got {machine.torch}",
            "pip install 'torch>=2.12'",
        )


def _of_failures(machine: MachineFacts, kernels: Sequence[KernelFacts]) -> Iterator[Advice]:
    """What the known failures to load mean."""
    facts = {"torch": machine.torch, "cuda": machine.cuda or "none"}
    for kernel in kernels:
        said = " ".join(kernel.reasons)
        if "fails to load" not in said:
            continue
        meaning = next((means for mark, means in TRAPS if mark in said), "")
        if meaning:
            fits = [
                w.requirement for w in fitting(machine) if _of_kernel(kernel.name, w.requirement)
            ]
            command = f"pip install --force-reinstall --no-deps '{fits[0]}'" if fits else ""
            yield Advice(f"{kernel.name} fails to load: {meaning.format(**facts)}", command)


def _of_kernel(kernel: str, requirement: str) -> bool:
    starts = {"flash_attn_3": "tokenspeed-fa3", "fa3_fwd": "fa3-fwd", "sgl_kernel": "sgl"}
    return requirement.startswith(starts.get(kernel, "?"))


def _any(kernels: Sequence[KernelFacts], dtype: str) -> bool:
    return any(kernel.build is not None and dtype in kernel.build.dtypes for kernel in kernels)
