"""Models that diffusers splits over ranks: equal to one process, whatever way they are switched."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from diffusers.hooks.context_parallel import _get_submodule_by_name
from diffusers.models.attention_dispatch import attention_backend
from ranks import degrees, known, results, split
from torch import Tensor, nn
from zoo import CASES, Case, Layout
from zoo.case import BATCH, TEXT, cast, prompt, randn

from diffusers_fa3 import (
    FA3AttnProcessor,
    FallbackWarning,
    MaskError,
    ParallelError,
    UnsupportedModelError,
    coverage,
    cp_plan,
    disable_fa3,
    enable_fa3,
    register,
    unregister,
)
from diffusers_fa3.layers import frame
from diffusers_fa3.layers.find import attention_layers
from diffusers_fa3.masks.read import _Facts
from diffusers_fa3.parallel.exchange import sent
from diffusers_fa3.parallel.plans import PLANS, named_by_ours

ZOO = {case.name: case for case in CASES}


def with_batched_ids(layout: Layout, pads: float) -> dict[str, Any]:
    """Flux2's plan splits ids of three axes alone, which its pipeline passes."""
    inputs = ZOO["flux2"].inputs(layout, pads)
    return inputs | {name: inputs[name][None] for name in ("txt_ids", "img_ids")}


OWN = [ZOO[name] for name in ("qwenimage", "flux", "flux_ip_adapter") if name in ZOO]
"""Cases of classes that diffusers itself has a right plan for, and whose masks a rank passes."""
OWN += [replace(ZOO["flux2"], inputs=with_batched_ids)]


def families() -> dict[str, tuple[list[Case], dict[str, str]]]:
    """Cases by the files that fit them to ranks, and what is refused there in words."""
    import split_image
    import split_video

    return {
        "own": (OWN, {}),
        "image": (list(split_image.CASES), split_image.REFUSED),
        "video": (list(split_video.CASES), split_video.REFUSED),
    }


def own_part(inputs: dict[str, Any]) -> dict[str, Any]:
    """Flux's mask is a caller's, who passes each rank's part: of the text, then of the image."""
    kwargs = inputs.get("joint_attention_kwargs") or {}
    mask = kwargs.get("attention_mask")
    if mask is None:
        return inputs
    parts = [
        whole.tensor_split(dist.get_world_size(), -1)[dist.get_rank()]
        for whole in (mask[..., :TEXT], mask[..., TEXT:])
    ]
    own = torch.cat(parts, -1)
    return inputs | {"joint_attention_kwargs": kwargs | {"attention_mask": own}}


def output(case: Case, model: nn.Module, layout: Layout, part: bool = False) -> Tensor:
    inputs = case.inputs(layout, 0.0)
    with torch.no_grad():
        returned = model(**(own_part(inputs) if part else inputs), return_dict=False)
    return case.pick(returned)


def stay_local(*_: object) -> None:
    """In the place of `split_of`: each rank would see its own tokens only."""


IN_FACTORS = re.compile("chroma|bria_fibo|hunyuan_video15")
"""Cases whose masks are kept in two factors, which travel in two messages."""


class Found(NamedTuple):
    """What a case gave in one mode and layout, against the default attention on one process."""

    error: float
    """In parts of the largest value, if that is above 1."""
    reads: int = 0
    """Reads of masks, as `reads_of_one` are on one process."""
    reads_of_one: int = 0
    plans: int = 0
    plans_of_one: int = 0
    sent: Mapping[str, int] | None = None
    reasons: tuple[str, ...] = ()
    """Of calls left to the default."""


@contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """Count how often a mask is read from its device."""
    reads: Counter[str] = Counter()
    read = _Facts.read

    def counting(**facts: Any) -> Any:
        reads["mask"] += 1
        return read(**facts)

    with mock.patch.object(_Facts, "read", counting):
        yield reads


def parity(
    rank: int, family: str, modes: tuple[str, ...], some: slice
) -> dict[tuple[str, str, str], Found | str]:
    """What each case gives in each mode and layout, or the words of a refusal."""
    torch.manual_seed(0)
    cases, _ = families()[family]
    found: dict[tuple[str, str, str], Found | str] = {}
    for case in (case for case in cases if case.layouts[some]):
        default, single = case.build(), switched(case.build(), "silent")
        models: dict[str, nn.Module] = {}
        for layout in case.layouts[some]:
            expected = output(case, default, layout)
            before = coverage(single)
            with counted_reads() as once:
                output(case, single, layout)
            plans_of_one = coverage(single).plans_made - before.plans_made
            for mode in modes:
                try:
                    if mode not in models:
                        model = split(case.build(), cp_plan(default), **degrees(mode))
                        models[mode] = switched(model, "silent" if case.refusal else "error")
                    before = coverage(models[mode])
                    sent.clear()
                    with counted_reads() as reads:
                        got = output(case, models[mode], layout, part=True)
                except Exception as error:  # told with the case's name, and judged there
                    found[case.name, mode, layout] = f"{type(error).__name__}: {error}"
                    models.pop(mode, None)
                    continue
                report = coverage(models[mode])
                found[case.name, mode, layout] = Found(
                    relative(got, expected),
                    reads["mask"],
                    once["mask"],
                    report.plans_made - before.plans_made,
                    plans_of_one,
                    dict(sent),
                    tuple(reason for row in report.rows for reason in row.fallbacks),
                )
        if modes[-1] not in models:
            continue
        try:
            with mock.patch.object(frame, "split_of", stay_local):
                local = output(case, models[modes[-1]], layout, part=True)
            found[case.name, "local", ""] = Found(relative(local, expected))
        except (RuntimeError, MaskError):  # a mask of all tokens, on those of one rank
            found[case.name, "local", ""] = Found(float("inf"))
    return found


LAST = slice(-1, None)
"""The layout that a case names last: of those that take a mask, a gap in it."""


def switched(model: nn.Module, fallback: str) -> nn.Module:
    enable_fa3(model, kernel="reference", fallback=fallback)
    return model


def sent_by(found: Found, what: str) -> int:
    return (found.sent or {}).get(what, 0)


def relative(got: Tensor, expected: Tensor) -> float:
    """The largest difference, in parts of the largest value if that is above 1."""
    return (got - expected).abs().max().item() / max(1.0, expected.abs().max().item())


def plan_of(case: Case) -> Any:
    return cp_plan(case.build())


def check(family: str, world: int, modes: tuple[str, ...], some: slice = slice(None)) -> None:
    """Run a family's cases, with some of their layouts."""
    _, refused = families()[family]
    ranks = results("test_parallel_models:parity", world, family, known(modes), some)
    wrong = []
    for case, mode, layout in ranks[0]:
        words = next((refused[n] for n in (f"{case}/{layout}", case) if n in refused), None)
        for found in (each[case, mode, layout] for each in ranks):
            where = f"{case} {mode} {layout}: {found}"
            if isinstance(found, str):
                if words is None or not re.search(words, found):
                    wrong.append(where)
                continue
            if mode == "local":
                # The counterpart: a model whose attention stays local must not pass.
                wrong += [where] if found.error < 1e-5 else []
                continue
            fine = found.error < 1e-6 and sent_by(found, "tokens") > 0
            # Masks are put together, read and planned as often as on one process plans them.
            messages = 2 if IN_FACTORS.match(case) else 1
            fine = fine and sent_by(found, "mask") <= messages * found.plans_of_one
            fine = fine and found.reads <= found.reads_of_one and found.plans <= found.plans_of_one
            allowed = ZOO[case].refusal if case in ZOO else None
            fine = fine and all(allowed and re.search(allowed.reason, r) for r in found.reasons)
            wrong += [] if fine else [where]
    assert not wrong, "\n".join(wrong)


FAMILIES = ("own", "image", "video")


@pytest.mark.parametrize("family", FAMILIES)
def test_split_models_are_as_on_one_process(family: str) -> None:
    check(family, 2, ("U2", "RA2") if known(("RA2",)) else ("U2", "R2"), LAST)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_split_models_are_as_on_one_process_in_every_layout(family: str) -> None:
    check(family, 2, ("U2", "R2", "UA2", "RA2"))
    check(family, 4, ("R4", "U2R2"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_split_models_are_as_on_one_process_on_four_ranks(family: str) -> None:
    check(family, 4, ("R4", "U2R2"), LAST)


def odd_sizes(rank: int, modes: tuple[str, ...], words: int) -> dict[tuple[str, str], float]:
    """Errors of Qwen-Image with so many words, beside 24 tokens of an image."""
    case = ZOO["qwenimage"]
    found = {}
    for layout in ("none", "ragged", "gap"):
        text, mask = prompt(layout, 16, 0.0, length=words)
        inputs = case.inputs(layout, 0.0) | {
            "hidden_states": randn(BATCH, 24, 16),
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": mask,
            "img_shapes": [(1, 4, 6)] * BATCH,
        }
        with torch.no_grad():
            expected = case.build()(**inputs, return_dict=False)[0]
            for mode in modes:
                model = split(case.build(), None, **degrees(mode))
                enable_fa3(model, kernel="reference", fallback="error")
                got = model(**inputs, return_dict=False)[0]
                found[mode, layout] = relative(got, expected)
    return found


@pytest.mark.parametrize(
    ("world", "modes", "words"),
    [(2, ("UA2", "RA2"), 13), (3, ("UA3", "RA3"), 13), (3, ("R3",), 12)],
)
def test_words_that_do_not_divide_and_three_ranks(
    world: int, modes: tuple[str, ...], words: int
) -> None:
    """Two heads on three ranks, too: one of them has none."""
    if "qwenimage" not in ZOO or not known(modes):
        pytest.skip("this diffusers lacks Qwen-Image's masks, or `*_anything`")
    for found in results("test_parallel_models:odd_sizes", world, modes, words):
        assert len(found) == len(modes) * 3
        for case, error in found.items():
            assert error < 1e-6, case


def gradients(rank: int, family: str, modes: tuple[str, ...]) -> dict[tuple[str, str], float | str]:
    """The worst error of a gradient of parameters and tokens, summed over ranks, in float64."""
    found: dict[tuple[str, str], float | str] = {}
    cases, refused = families()[family]
    for case in (case for case in cases if case.name not in refused):
        layout = case.layouts[-1]
        whole = case.build(torch.float64)
        inputs = cast(case.inputs(layout, 0.0), torch.float64)
        wanted = with_gradients(inputs)
        case.pick(whole(**wanted, return_dict=False)).square().sum().backward()
        for mode in modes:
            model = case.build(torch.float64)
            try:
                split(model, plan_of(case), **degrees(mode))
                enable_fa3(model, kernel="reference", fallback="silent")
                given = with_gradients(inputs)
                out = case.pick(model(**own_part(given), return_dict=False))
            except (ParallelError, UnsupportedModelError) as error:
                found[case.name, mode] = str(error)
                continue
            out.square().sum().backward()
            pairs = [*zip(model.parameters(), whole.parameters())]
            pairs += [(given[name], wanted[name]) for name in given if is_learned(given[name])]
            found[case.name, mode] = gradient_error(pairs)
    return found


def with_gradients(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same, with tokens whose gradients are asked for."""
    names = ("hidden_states", "encoder_hidden_states")
    learned = {
        name: inputs[name].clone().requires_grad_()
        for name in names
        if isinstance(inputs.get(name), Tensor) and inputs[name].is_floating_point()
    }
    return inputs | learned


def is_learned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def gradient_error(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The worst error of a gradient, summed over ranks, in parts of the largest of all."""
    worst = 0.0
    largest = max(float(theirs.grad.abs().max()) for _, theirs in pairs if theirs.grad is not None)
    for ours, theirs in pairs:
        if theirs.grad is None:
            continue
        total = torch.zeros_like(theirs) if ours.grad is None else ours.grad.clone()
        dist.all_reduce(total)
        worst = max(worst, float((total - theirs.grad).abs().max()) / largest)
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_summed_over_ranks_are_those_of_one_process(family: str) -> None:
    cases = {case.name: case for case in families()[family][0]}
    wrong = set()
    modes = known(("U2", "R2", "UA2", "RA2") if family == "own" else ("U2", "R2"))
    for found in results("test_parallel_models:gradients", 2, family, modes):
        for (case, mode), error in found.items():
            plan = PLANS.get(cases[case].model.__name__)
            if isinstance(error, str):
                fine = plan is not None and not plan.trains and "gradients, of a model" in error
            else:
                fine = error < 1e-7  # some norms compute in float32
            wrong |= set() if fine else {f"{case} {mode}: {error}"}
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.slow
def test_gradients_of_both_ways_together_are_those_of_one_process() -> None:
    modes = known(("U2R2", "R4"))
    for found in results("test_parallel_models:gradients", 4, "own", modes):
        assert len(found) == len(OWN) * len(modes)
        for case, error in found.items():
            assert isinstance(error, float), (case, error)
            assert error < 1e-7, (case, error)


def by_hand(model: nn.Module) -> None:
    processors = {
        name: FA3AttnProcessor(processor, kernel="reference", fallback="error")
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(processors)


def switch(model: nn.Module) -> None:
    enable_fa3(model, kernel="reference", fallback="error")


def ways(rank: int) -> dict[str, float]:
    """The error of every way to switch a split model, against one process."""
    case = next(case for case in OWN if case.name == "flux")
    layout: Layout = "ragged"
    expected = output(case, case.build(), layout)
    found = {}

    def note(name: str, model: nn.Module) -> None:
        found[name] = (output(case, model, layout, part=True) - expected).abs().max().item()

    def parallel(model: nn.Module) -> nn.Module:
        return split(model, None, ring_degree=2)

    for name, how in (("enable_fa3", switch), ("by hand", by_hand)):
        model = case.build()
        how(model)
        note(f"{name}, then enable_parallelism", parallel(model))
        model = parallel(case.build())
        how(model)
        note(f"enable_parallelism, then {name}", model)
    model = case.build()
    switch(model)
    note("a deep copy of a switched model", parallel(copy.deepcopy(model)))
    note("a switched model after pickling", parallel(pickle.loads(pickle.dumps(model))))
    switch(parallel(model))
    note("switched, split, switched again", model)
    register()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        model = case.build()
        model.set_attention_backend("fa3")
        note('set_attention_backend("fa3"), then enable_parallelism', parallel(model))
        model = parallel(case.build())
        model.set_attention_backend("fa3")
        note('enable_parallelism, then set_attention_backend("fa3")', model)
        model = parallel(case.build())
        with attention_backend("fa3"):
            note('attention_backend("fa3")', model)
        with attention_backend("fa3"):
            model = parallel(case.build())
            note('enable_parallelism in attention_backend("fa3")', model)
    unregister()
    return found


def test_every_way_to_switch_a_split_model_is_exact() -> None:
    for found in results("test_parallel_models:ways", 2):
        assert len(found) == 11
        for way, error in found.items():
            assert error < 1e-6, way


def adapter(rank: int) -> list[str]:
    """An IP-Adapter that is loaded into a split model changes its plan."""
    import split_image

    case = ZOO["sd3_ip_adapter"]
    plain = replace(case, prepare=None)
    model = split(plain.build(), cp_plan(plain.build()), ring_degree=2)
    enable_fa3(model, kernel="reference", fallback="silent")
    said = []
    for again in (False, True):
        try:
            output(ZOO["sd3"] if not again else case, model, "none")
            said.append("served")
        except ParallelError as error:
            said.append(str(error))
        if not again:
            split_image._add_ip_adapter(model)
            enable_fa3(model, kernel="reference", fallback="silent")
    return said


def test_an_adapter_that_is_loaded_into_a_split_model_is_refused() -> None:
    for first, second in results("test_parallel_models:adapter", 2):
        assert first == "served"
        assert "takes no part in it" in second


def test_every_class_has_a_plan_or_a_reason() -> None:
    for case in CASES:
        model = case.build()
        try:
            reason = "" if cp_plan(model) else "an empty plan: nobody wrote one"
        except UnsupportedModelError as error:
            reason = str(error)
        assert "nobody wrote one" not in reason, case.name


def test_plans_of_ours_name_layers_and_modules_that_are_there() -> None:
    seen = set()
    for case in CASES:
        plan = PLANS.get(case.model.__name__)
        if plan is None:
            continue
        seen.add(case.model.__name__)
        model = case.build()
        try:
            made = plan.make(model)
        except UnsupportedModelError:  # this model of the class, with its options
            continue
        for place in made:
            assert _get_submodule_by_name(model, place), (case.name, place)
        named = [named_by_ours(model, name) for name, _ in attention_layers(model)]
        assert any(each.split for each in named) or not plan.split, case.name
        assert not any(each.split and each.local for each in named), case.name
        assert any(map(any, named)) or not (plan.split or plan.local), case.name
    assert seen == PLANS.keys() & {case.model.__name__ for case in CASES}


def test_a_user_class_below_one_with_a_plan_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(ZOO["sd3"].model):  # type: ignore[misc, name-defined]
        pass

    model = replace(ZOO["sd3"], model=Mine).build()
    assert cp_plan(model) == cp_plan(ZOO["sd3"].build())


def test_disabling_leaves_nothing_on_a_model() -> None:
    model = ZOO["sd3"].build()
    before: Callable[[], list[set[str]]] = lambda: [{*vars(m)} for m in model.modules()]  # noqa: E731
    names = before()
    enable_fa3(model, kernel="reference")
    disable_fa3(model)
    assert before() == names
