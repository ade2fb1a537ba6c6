"""The check of a pipeline whose models are split over ranks, as each rank makes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from diffusers_fa3.kernels import KernelChoice
from diffusers_fa3.layers import coverage, disable_fa3, enable_fa3
from diffusers_fa3.tools.check.arguments import arguments_of
from diffusers_fa3.tools.check.by_layer import by_layer
from diffusers_fa3.tools.check.check import STEPS, be_quiet, machine_of
from diffusers_fa3.tools.check.drawn import Runs, draw, drawn_of, pictures_of
from diffusers_fa3.tools.check.gather import of_all_ranks
from diffusers_fa3.tools.check.kept import device_of, kept
from diffusers_fa3.tools.check.kernel_errors import errors_of_kernels
from diffusers_fa3.tools.check.observed import words_of_kernel
from diffusers_fa3.tools.check.parity import UNCOMPARED, Drawn, Layer, Parity
from diffusers_fa3.tools.check.runs import Run, must_run, run, words_of
from diffusers_fa3.tools.check.split_calls import RankObserver
from diffusers_fa3.tools.check.splitting import (
    heads_of,
    mode_for,
    models_to_split,
    split,
    words_of_mode,
)


def check_on_ranks(
    pipe: Any,
    inputs: Mapping[str, Any] | None = None,
    *,
    kernel: KernelChoice = "auto",
    prompts: Sequence[str] | None = None,
    steps: int = STEPS,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Parity:
    """`check_parity` of a pipeline that is split over all ranks of torch.distributed.

    Each rank calls it with a pipeline of its own, and gets what all found. The pipeline stays
    split. First it is drawn on one process: on the default, on ours and on another backend. Then it
    is split, and compared layer by layer; and drawn on ours again, which is compared with the
    default on one process.

    Raises:
        InputError: arguments that lack, or with which the model does not run.
        UnsupportedModelError: a model that cannot be split.
        ParallelError: a call that cannot be split.
        KernelUnavailableError: as `enable_fa3` raises it.
    """
    arguments = arguments_of(pipe, inputs, prompts, steps)
    with kept(pipe):
        be_quiet(pipe)
        enable_fa3(pipe, kernel=kernel, fallback="silent")
        models = models_to_split(pipe)
        disable_fa3(pipe)
        runs, _ = draw(pipe, arguments, kernel=kernel, layers=None, seed=seed, on_step=on_progress)

        ranks = dist.get_world_size()
        mode = mode_for([heads_of(model) for model in models], ranks)
        how = f"split over {ranks} ranks by {words_of_mode(mode)}, as it does on one process"
        with must_run(how, _mend(pipe)), errors_of_kernels() as errors:
            split(models, mode)
            observer = RankObserver(
                lambda: on_progress("layer by layer"), dist.get_rank(), errors=errors
            )
            found, counted = by_layer(pipe, arguments, kernel, None, seed, observer)
            layers = merged(of_all_ranks(found))
            served = not any(of_all_ranks(runs.raised)) and not any(o.raised for o in layers)
            on_ranks = None
            if served:
                on_ranks, counted = _run_on_ranks(pipe, arguments, kernel, seed, on_progress)
            drawn = _drawn_on_ranks(runs, on_ranks, errors, models)
    return Parity(
        type(pipe).__name__,
        words_of_kernel(kernel),
        layers,
        drawn,
        counted,
        words_of({**arguments, "seed": seed}),
        machine_of(pipe),
        pictures_of(runs.default.result, None if on_ranks is None else on_ranks.result),
        ranks,
        words_of_mode(mode),
    )


def _mend(pipe: Any) -> str:
    """What may help where the split model does not run."""
    if device_of(pipe).type == "cpu":
        return (
            "On CPUs the tokens must divide by the number of ranks: another --ranks N may do, or "
            "another size or prompt"
        )
    return "Another number of --ranks may do"


def _run_on_ranks(
    pipe: Any,
    arguments: Mapping[str, Any],
    kernel: KernelChoice,
    seed: int,
    on_progress: Callable[[str], None],
) -> tuple[Run, Any]:
    enable_fa3(pipe, kernel=kernel, fallback="silent")
    try:
        on_ranks = run(pipe, arguments, seed, lambda: on_progress("ours on ranks"))
        return on_ranks, coverage(pipe)
    finally:
        disable_fa3(pipe)


def _drawn_on_ranks(
    runs: Runs, on_ranks: Run | None, errors: Sequence[str], models: Sequence[Any]
) -> Drawn:
    """The whole, of the rank whose run on ranks ended furthest from the default's."""
    dtypes = [model.dtype for model in models if model.dtype.is_floating_point]
    rounding = max(torch.finfo(dtype).eps / 2 for dtype in dtypes or [torch.bfloat16])  # quantized
    drawn = drawn_of(runs, on_ranks, rounding)
    if on_ranks is None:
        drawn = replace(drawn, note="; ".join(filter(None, [drawn.note, UNCOMPARED])))
    elif errors:
        drawn = replace(drawn, raised=f"{errors[0]}, on rank {dist.get_rank()}")
    found = of_all_ranks(drawn)
    raised = dict.fromkeys(each.raised for each in found if each.raised)
    return replace(max(found, key=_distance), raised="; ".join(raised))


def _distance(drawn: Drawn) -> float:
    """Of the end of the run on ranks; what is not a number is further than any."""
    if drawn.end is None or drawn.end[1].on_ranks is None:
        return 0.0
    typical = drawn.end[1].on_ranks.typical
    return typical if typical == typical else torch.inf


def merged(of_ranks: Sequence[Sequence[Layer]]) -> tuple[Layer, ...]:
    """The layers of one rank, each with what all ranks found in it."""
    return tuple(
        replace(
            same[0],
            calls=tuple(call for layer in same for call in layer.calls),
            raised=tuple(raised for layer in same for raised in layer.raised),
            fallbacks=dict(sum((Counter(layer.fallbacks) for layer in same), Counter())),
        )
        for same in zip(*of_ranks, strict=True)
    )
