"""check_parity: a user's own model or pipeline, on its default attention and on this one."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import nn

from diffusers_fa3.errors import InputError
from diffusers_fa3.kernels import KernelChoice, available_kernels
from diffusers_fa3.tools.check.arguments import arguments_of
from diffusers_fa3.tools.check.by_layer import by_layer
from diffusers_fa3.tools.check.drawn import Pictures, draw, drawn_of, pictures_of
from diffusers_fa3.tools.check.kept import components_of, device_of, kept, modules_of
from diffusers_fa3.tools.check.observed import Observer, words_of_kernel
from diffusers_fa3.tools.check.parity import UNCOMPARED, Drawn, Parity
from diffusers_fa3.tools.check.runs import must_run, words_of

STEPS = 4
"""Denoising steps: enough to see whether a difference grows."""


def check_parity(
    pipe_or_model: Any,
    inputs: Mapping[str, Any] | None = None,
    *,
    kernel: KernelChoice = "auto",
    layers: Any = None,
    prompts: Sequence[str] | None = None,
    steps: int = STEPS,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Parity:
    """Compare a model or pipeline on its default attention with itself on a kernel.

    First layer by layer: in a run on the default attention, the inputs of each attention call are
    given to the kernel too, in the way in which a switched layer does it, and both outputs are
    compared with float64. A call passes if the kernel's error is at most twice the default's own
    error, plus a few roundings: its largest error, and the root of the mean square. Then the whole:
    latents after each step, and pictures, on the default and on the kernel, from the same noise.
    These are reported, beside the difference that another backend of PyTorch makes; only values
    that are not finite fail there.

    Calls that the default attention serves in a switched layer are listed with the reason. They
    fail the check only if `kernel` is a name or a function.

    The model is left as it was: processors, hooks, modes, settings and counts of an earlier
    `enable_fa3`, PyTorch's random state. The check itself runs without these settings, in eval
    mode, and not compiled where layers are compared. There is one copy of the model; float64 is
    computed in blocks.

    Args:
        pipe_or_model: a pipeline of diffusers, or a model.
        inputs: arguments of the call, by name. A model needs all; a pipeline gets `prompts`,
            `steps` and a size that suits the device, unless they are given here.
        kernel: as for `enable_fa3`.
        layers: as for `enable_fa3`.
        prompts: the pipeline's prompts; by default two of different length, since padding is where
            it matters.
        steps: denoising steps.
        seed: of the noise.
        on_progress: called after each comparison and each step, with the name of the stage.

    Raises:
        InputError: arguments that lack, or with which the model does not run on its default.
        UnsupportedModelError, KernelUnavailableError: as `enable_fa3` raises them.

    Example:
        >>> import torch
        >>> from diffusers.models.attention_processor import Attention
        >>> from diffusers_fa3 import check_parity
        >>> block = Attention(query_dim=8, heads=2, dim_head=4)
        >>> parity = check_parity(block, {"hidden_states": torch.randn(1, 5, 8)})
        >>> parity.passed, parity.calls
        (True, 1)
    """
    _refuse_split(pipe_or_model)
    if kernel == "fastest":
        raise InputError(
            'a check compares a kernel with the default; got kernel="fastest", which may take '
            'either. Give "auto", a name or a function'
        )
    arguments = arguments_of(pipe_or_model, inputs, prompts, steps)
    with kept(pipe_or_model):
        be_quiet(pipe_or_model)
        observer = Observer(lambda: on_progress("layer by layer"))
        with must_run():
            found, report = by_layer(pipe_or_model, arguments, kernel, layers, seed, observer)
        pictures: Pictures | None = None
        if any(layer.raised for layer in found):
            drawn = Drawn((), None, UNCOMPARED)
        else:
            runs, report = draw(
                pipe_or_model,
                arguments,
                kernel=kernel,
                layers=layers,
                seed=seed,
                on_step=on_progress,
            )
            drawn = drawn_of(runs)
            pictures = pictures_of(runs.default.result, runs.ours.result)
    return Parity(
        type(pipe_or_model).__name__,
        words_of_kernel(kernel),
        found,
        drawn,
        report,
        words_of({**arguments, "seed": seed}),
        machine_of(pipe_or_model),
        pictures,
    )


def _refuse_split(pipe_or_model: Any) -> None:
    split = (getattr(m, "_parallel_config", None) for m in modules_of(pipe_or_model))
    if any(config is not None for config in split):
        raise InputError(
            "check_parity runs on one process; got a model that is split over ranks. Check it "
            "before enable_parallelism, or have `diffusers-fa3 check MODEL --ranks N` split it"
        )


def be_quiet(pipe_or_model: Any) -> None:
    """Keep a pipeline from showing a bar of its own."""
    if hasattr(pipe_or_model, "set_progress_bar_config"):
        pipe_or_model.set_progress_bar_config(disable=True)


def machine_of(pipe_or_model: Any) -> dict[str, str]:
    """What is needed to repeat the check."""
    modules = [c for c in components_of(pipe_or_model).values() if isinstance(c, nn.Module)]
    weights = [weight for module in modules for weight in module.parameters()]
    device = device_of(pipe_or_model)
    kinds = dict.fromkeys(str(weight.dtype).removeprefix("torch.") for weight in weights)
    usable = [row for row in available_kernels(device.type) if row.accepted]
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.machine(),
        "dtype": ", ".join(kinds),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "diffusers": diffusers.__version__,
        "kernels": ", ".join(f"{row.name} {row.version}" for row in usable),
    }
