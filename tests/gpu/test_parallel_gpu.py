"""Models that are split over GPUs, by NCCL and in bfloat16: as exact as the default on one GPU."""

from __future__ import annotations

import faulthandler
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple
from unittest import mock

import pytest
import split_video
import torch
import torch.distributed as dist
import zoo.case
from gpu.installed_kernels import usable
from ranks import degrees, split
from test_parallel_compile import WHOLE
from test_parallel_models import own_part, stay_local
from torch import Tensor, nn
from zoo import CASES, Case
from zoo.budget import budget, error
from zoo.case import BATCH, TEXT, cast

from diffusers_fa3 import MaskError, coverage, cp_plan, enable_fa3
from diffusers_fa3.layers import frame
from diffusers_fa3.parallel.exchange import sent
from diffusers_fa3.tools.check.processes import on_ranks

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="fewer than two CUDA devices"),
]

WORLD = 4 if GPUS >= 4 else 2
"""Ranks that all numbers of tokens and heads divide by."""
PATIENCE = timedelta(seconds=60)
"""How long a rank waits for another one."""
ENDED = 600
"""Seconds after which a rank ends itself, if something else hangs. It needs some twenty."""

HEADS = 4
WIDTHS = {
    "sd3": {"caption_projection_dim": 64 * HEADS},
    "ltx": {"cross_attention_dim": 64 * HEADS},
}
"""What must be as wide as all heads together."""
LOUD = 16
"""How large values are, about, where the other layers' are 1."""
NAMES = ("qwenimage", "flux", "chroma", "ltx", "hunyuan_video15_t2v", "sd3", "wan_t2v")
FIRST_SHARD = "first shard"
"""The layout in which all words of the first rank are padding."""
LOCAL = "local"
"""In the place of a layout: where each rank's attention sees its own tokens only."""
LAYOUTS = ("none", "right", "left", "gap", FIRST_SHARD)


class Asked(NamedTuple):
    """What the ranks are to run, where the defaults are what GPUs run."""

    dtype: torch.dtype = torch.bfloat16
    kernel: str = "auto"
    backend: str = "inductor"
    """Of torch.compile."""


class Found(NamedTuple):
    """What a rank found of a split model in one layout."""

    error: float
    allowed: float
    """Twice that of the default on one GPU."""
    routes: Counter[str]
    """Calls on a kernel, by route."""
    sent: int = 0
    """Messages with tokens that this rank took part in."""

    @property
    def fits(self) -> bool:
        """Whether the split model is as exact as the default."""
        return self.error <= self.allowed


Answers = dict[tuple[str, str, str], Found]
"""By case, mode and layout."""


def fitted(name: str) -> Case:
    """A case of the zoo with as many heads as ranks can share, and with loud attention."""
    case = next(case for case in (*split_video.CASES, *CASES) if case.name == name)
    config = {**case.config, "num_attention_heads": HEADS, **WIDTHS.get(name, {})}
    return replace(case, config=config, prepare=make_loud)


def make_loud(model: nn.Module) -> None:
    """Let attention be most of the output: else a wrong one is lost in bfloat16's rounding."""
    for name, module in model.named_modules():
        if name.endswith(("to_v", "add_v_proj")):
            nn.init.normal_(module.weight, std=LOUD / module.weight.shape[1] ** 0.5)


def laid_out(case: Case, layout: str) -> Case:
    """A case in one layout, whatever layout it is asked for."""
    if layout != FIRST_SHARD:
        inputs = case.inputs(layout, 0.0)
    else:

        def first_shard(_: str, length: int = TEXT) -> Tensor:
            return (torch.arange(length) >= length // dist.get_world_size()).repeat(BATCH, 1)

        with mock.patch.object(zoo.case, "key_mask", first_shard):
            inputs = case.inputs("right", 0.0)
    # Times that bfloat16 has, also times 1000: their rounding could be most of the error.
    times = torch.tensor([0.25, 0.5]) * (1000 if inputs["timestep"].max() > 1 else 1)
    return replace(case, inputs=lambda *_: inputs | {"timestep": times})


def layouts(case: Case) -> list[str]:
    """Those that the model takes."""
    any_mask = "left" in case.layouts
    return [n for n in LAYOUTS if n in case.layouts or (any_mask and n == FIRST_SHARD)]


def modes() -> tuple[str, ...]:
    """The ways to split over these ranks, as `degrees` spells them."""
    world = dist.get_world_size()
    return (f"U{world}", f"R{world}", *(["U2R2"] if world == 4 else []))


def split_model(case: Case, mode: str, asked: Asked, device: torch.device) -> nn.Module:
    """Split and switched; a call that no kernel can take raises."""
    model = case.build(asked.dtype).to(device)
    enable_fa3(model, kernel=asked.kernel, fallback="error")
    return split(model, cp_plan(model), **degrees(mode))


def output(case: Case, model: nn.Module) -> Tensor:
    """What a rank is given by the split model: the whole output."""
    weight = next(model.parameters())
    inputs = own_part(cast(case.inputs("none", 0.0), weight.dtype, weight.device))
    with torch.no_grad():
        return case.pick(model(**inputs, return_dict=False)).cpu()


def judged(case: Case, got: Tensor, asked: Asked, device: torch.device) -> tuple[float, float]:
    """The error of an output, and what is allowed by that of the default on one GPU."""
    exact = case.exact("none")
    default = case.run(case.build(asked.dtype).to(device), "none").cpu()
    return error(got, exact), budget(default, exact)


def routes(model: nn.Module) -> Counter[str]:
    """The calls of a model on a kernel so far."""
    return sum((Counter(row.calls) for row in coverage(model).rows), Counter())


def of_all_ranks(found: Answers) -> list[Answers]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    return every


def parity(asked: Asked, device: torch.device, _: object) -> list[Answers]:
    """Every case in each mode and layout; and with attention left local, in its first layout."""
    faulthandler.dump_traceback_later(ENDED, exit=True)
    found: Answers = {}
    for case in map(fitted, NAMES):
        models = {mode: split_model(case, mode, asked, device) for mode in modes()}
        for layout in layouts(case):
            now = laid_out(case, layout)
            for mode, model in models.items():
                before = routes(model)
                sent.clear()
                errors = judged(now, output(now, model), asked, device)
                served = routes(model) - before
                found[case.name, mode, layout] = Found(*errors, served, sent["tokens"])
        now = laid_out(case, layouts(case)[0])
        for mode, model in models.items():
            try:
                with mock.patch.object(frame, "split_of", stay_local):
                    errors = judged(now, output(now, model), asked, device)
            except MaskError:  # a mask of all tokens, on those of one rank
                errors = (float("inf"), 0.0)
            found[case.name, mode, LOCAL] = Found(*errors, Counter())
    return of_all_ranks(found)


def compiled(asked: Asked, device: torch.device, _: object) -> list[Answers]:
    """Flux in one graph, or one for each block, in two layouts."""
    faulthandler.dump_traceback_later(ENDED, exit=True)
    found: Answers = {}
    for mode in modes():
        for layout in ("none", "gap"):
            torch._dynamo.reset()
            case = laid_out(fitted("flux"), layout)
            model: Any = split_model(case, mode, asked, device)
            graph = model
            if WHOLE:
                graph = torch.compile(model, fullgraph=True, backend=asked.backend)
            else:
                model.compile_repeated_blocks(fullgraph=True, backend=asked.backend)
            for _ in range(2):
                got = output(case, graph)
            errors = judged(case, got, asked, device)
            found["flux", mode, layout] = Found(*errors, routes(model))
    return of_all_ranks(found)


def on_gpus(work: Callable[..., list[Answers]]) -> list[Answers]:
    return on_ranks(work, Asked(), WORLD, "cuda", print, PATIENCE)


@pytest.fixture(scope="module")
def answers() -> list[Answers]:
    """Of each rank."""
    if not usable():
        pytest.skip("no kernel for this GPU is installed")
    return on_gpus(parity)


def wrong(answers: list[Answers]) -> list[str]:
    """Split models that are not as exact as one GPU, or whose tokens did not travel."""
    return [
        f"rank {rank}, {' '.join(key)}: {found}"
        for rank, of_rank in enumerate(answers)
        for key, found in of_rank.items()
        if key[-1] != LOCAL and not (found.fits and found.routes and found.sent)
    ]


def unseen(answers: list[Answers]) -> list[str]:
    """Models whose attention stayed local, and that came out as exact all the same."""
    return [
        f"rank {rank}, {' '.join(key)}: {found}"
        for rank, of_rank in enumerate(answers)
        for key, found in of_rank.items()
        if key[-1] == LOCAL and found.fits
    ]


def test_split_models_are_as_exact_as_the_default_on_one_gpu(answers: list[Answers]) -> None:
    assert len(answers) == WORLD
    assert not wrong(answers), "\n".join(wrong(answers))


def test_models_whose_attention_stays_local_are_not(answers: list[Answers]) -> None:
    assert not unseen(answers), "\n".join(unseen(answers))


def check_compiled(answers: list[Answers]) -> None:
    for of_rank in answers:
        for (_, mode, layout), found in of_rank.items():
            assert found.fits, (mode, layout, found)
            route = "dense" if layout == "none" else "static"
            assert found.routes == {route: 4}, (mode, layout)  # 2 layers, twice


def test_a_compiled_model_is_as_exact_as_the_default_on_one_gpu() -> None:
    if not usable():
        pytest.skip("no kernel for this GPU is installed")
    check_compiled(on_gpus(compiled))
