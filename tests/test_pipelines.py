"""Try it as a new user would: whole pipelines, from the prompt to the picture."""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args, get_type_hints

import diffusers
import pytest
import torch
from diffusers import (
    ComponentsManager,
    DiffusionPipeline,
    ModelMixin,
    ModularPipeline,
    MotionAdapter,
)
from diffusers.models import controlnets, transformers, unets
from diffusers.models.attention_processor import (
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from pipelines import CASES, PipelineCase, modular, pixart, qwenimage, stable_diffusion_xl
from releases import needs
from switching import assert_same_objects, processors, switched
from torch import nn
from zoo.budget import assert_within_budget, budget, error
from zoo.watch import Call, Sdpa, first_keys, replaced, watched, without_mask

from diffusers_fa3 import (
    FA3AttnProcessor,
    UnsupportedModelError,
    coverage,
    disable_fa3,
    enable_fa3,
    flash_attn_varlen_func,
    register,
    unregister,
)
from diffusers_fa3.layers.find import models_of
from diffusers_fa3.layers.frame import running
from diffusers_fa3.layers.processor import record_of

BY_NAME = {case.name: case for case in CASES}
ALL_PIPELINES = ("0.37", "cannot import all of its pipelines beside transformers 5")

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def every_reused_plan_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.plans, "verify", True)


class Default(NamedTuple):
    """What a pipeline gives on its own attention, and the attention calls of each forward."""

    latents: torch.Tensor
    forwards: list[list[Call]]


@functools.cache
def default(case: PipelineCase) -> Default:
    pipe, forwards, starts = case.build(), [], []
    with watched() as log:
        for denoiser in parts(pipe, case, denoising=True).values():
            denoiser.register_forward_pre_hook(lambda *_: starts.append(len(log.calls)))
            denoiser.register_forward_hook(lambda *_: forwards.append(log.calls[starts.pop() :]))
        return Default(case.run(pipe), forwards)


@functools.cache
def exact(case: PipelineCase) -> torch.Tensor:
    """The pipeline's latents in float64, with its text encoders in float64 too."""
    return case.run(case.build(torch.float64))


def enable(pipe: Any, case: PipelineCase, **options: Any) -> None:
    """Switch to the reference kernel; only a case that says so may leave calls to the default."""
    fallback = "silent" if case.fallback else "error"
    enable_fa3(pipe, **{"kernel": "reference", "fallback": fallback, **options})


def assert_right(pipe: Any, case: PipelineCase) -> None:
    """The latents of one call are as close to float64 as the default's."""
    allowed = budget(default(case).latents, exact(case))
    assert allowed < 1e-4 * exact(case).abs().max(), "anything would do"
    assert_within_budget(case.run(pipe), default(case).latents, exact(case))


def parts(pipe: Any, case: PipelineCase, *, denoising: bool) -> dict[str, nn.Module]:
    """The models of a pipeline that denoise, or all others."""
    return {
        name: component
        for name, component in pipe.components.items()
        if isinstance(component, nn.Module) and (name in case.denoisers) is denoising
    }


def total(pipe: Any, column: str) -> Counter[str]:
    """The sum of a column ("calls" or "fallbacks") of a report over all layers."""
    return sum((Counter(getattr(row, column)) for row in coverage(pipe).rows), Counter())


# --- the same pictures, on the kernel ------------------------------------------------------------


@every_case
def test_a_pipeline_gives_what_it_gives_by_default(case: PipelineCase) -> None:
    pipe = case.build()
    enable(pipe, case)
    assert_right(pipe, case)

    reasons = total(pipe, "fallbacks")
    assert total(pipe, "calls").keys() == case.routes
    assert coverage(pipe).calls + reasons.total() == sum(map(len, default(case).forwards))
    assert all(case.fallback and re.search(case.fallback, reason) for reason in reasons)
    assert bool(reasons) == bool(case.fallback)


@every_case
def test_every_layer_that_denoises_is_switched_and_nothing_else(case: PipelineCase) -> None:
    pipe = case.build()
    rest = {name: processors(part) for name, part in parts(pipe, case, denoising=False).items()}
    enable(pipe, case)
    case.draw(pipe)

    denoisers = parts(pipe, case, denoising=True)
    assert denoisers.keys() == {*case.denoisers}
    for denoiser in denoisers.values():
        assert switched(denoiser) == processors(denoiser).keys() != set()
    rows = coverage(pipe).rows
    assert {row.name.split(".")[0] for row in rows} == {*case.denoisers}
    assert len(rows) == sum(len(processors(denoiser)) for denoiser in denoisers.values())
    assert all(row.kernel == "reference" for row in rows)
    assert all(row.calls or row.fallbacks for row in rows)

    for name, part in parts(pipe, case, denoising=False).items():
        assert_same_objects(part, rest[name])


@every_case
def test_disabling_brings_the_same_pictures_back(case: PipelineCase) -> None:
    pipe = case.build()
    before = {name: processors(part) for name, part in parts(pipe, case, denoising=True).items()}
    pictures = case.draw(pipe)
    enable(pipe, case)
    case.draw(pipe)
    disable_fa3(pipe)
    for name, part in parts(pipe, case, denoising=True).items():
        assert_same_objects(part, before[name])
    assert torch.equal(case.draw(pipe), pictures)


@every_case
def test_a_mask_is_read_at_most_once_in_a_forward(case: PipelineCase) -> None:
    """The number of layers does not matter, nor how often they rebuild the mask."""
    masks = [{call.content for call in calls if call.mask} for calls in default(case).forwards]
    masked = case.masked or bool(case.fallback)  # a bias is read before it is refused
    assert any(masks) == masked
    pipe = case.build()
    enable(pipe, case)
    case.run(pipe)
    assert coverage(pipe).plans_made <= sum(map(len, masks))
    assert bool(coverage(pipe).plans_made) == masked


def test_every_denoiser_of_every_pipeline_of_diffusers_is_known_by_its_name() -> None:
    needs(*ALL_PIPELINES)
    homes = tuple(module.__name__ for module in (transformers, unets, controlnets))
    unknown = {
        (name, kind.__name__)
        for name, kind in components_of_diffusers()
        if kind.__module__.startswith(homes)
        and kind is not MotionAdapter  # gives its weights to a UNet and never runs
        and not models_of(SimpleNamespace(components={name: nn.Identity()}))
    }
    assert unknown == set()


def components_of_diffusers() -> Iterator[tuple[str, type[ModelMixin]]]:
    """Name and class of all models that the pipelines take."""
    for pipeline in map(functools.partial(getattr, diffusers), dir(diffusers)):
        if inspect.isclass(pipeline) and issubclass(pipeline, DiffusionPipeline):
            for name, hint in get_type_hints(pipeline.__init__).items():
                for kind in classes_in(hint):
                    if issubclass(kind, ModelMixin):
                        yield name, kind


def classes_in(hint: Any) -> Iterator[type]:
    """The classes in a type hint."""
    if inspect.isclass(hint):
        yield hint
    for part in get_args(hint):
        yield from classes_in(part)


# --- that these tests can fail -------------------------------------------------------------------


def too_small(*args: Any, **kwargs: Any) -> Any:
    """A kernel whose results are a tenth too small."""
    return 0.9 * flash_attn_varlen_func(*args, **kwargs, kernel="reference")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.routes], ids=lambda case: case.name
)
def test_a_wrong_kernel_shows_in_what_is_compared(case: PipelineCase) -> None:
    pipe = case.build()
    enable(pipe, case, kernel=too_small)
    assert error(case.run(pipe), exact(case)) > 10 * budget(default(case).latents, exact(case))


WRONG_MASKS = [
    (case, spoilt)
    for case in CASES
    for spoilt in (without_mask, first_keys)
    # if padding is on the right, the first keys are the valid ones
    if case.masked and not (spoilt is first_keys and "seqused" in case.routes)
]


@pytest.mark.parametrize(
    ("case", "spoilt"), WRONG_MASKS, ids=[f"{c.name}-{wrong.__name__}" for c, wrong in WRONG_MASKS]
)
def test_a_wrong_mask_shows_in_what_is_compared(case: PipelineCase, spoilt: Sdpa) -> None:
    with replaced(spoilt):
        wrong = case.run(case.build())
    assert error(wrong, exact(case)) > 10 * budget(default(case).latents, exact(case))


# --- other ways to switch ------------------------------------------------------------------------


@pytest.fixture
def registered() -> Iterator[None]:
    register()
    yield
    unregister()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "name",
    [
        "flux_ip_adapter",
        "sd15_two_controlnets",
        "sdxl_ip_adapter",
        "ltx",
        "wan22",
        "qwenimage_modular",
    ],
)
def test_a_request_on_a_pipeline_is_as_good_as_enabling_it(name: str) -> None:
    case = BY_NAME[name]
    pipe = case.build()
    pipe.set_attn_processor(FA3AttnProcessor(kernel="reference", fallback="error"))
    assert_right(pipe, case)
    assert total(pipe, "calls").keys() == case.routes
    assert all(row.calls for row in coverage(pipe).rows)
    disable_fa3(pipe)
    assert {row.kernel for row in coverage(pipe).rows} == {"default"}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "name", ["qwenimage", "pixart_sigma", "sd15_controlnet", "qwenimage_modular"]
)
def test_the_name_of_the_backend_is_as_good_as_enabling_it(name: str) -> None:
    case = BY_NAME[name]
    pipe = case.build()
    denoisers = parts(pipe, case, denoising=True).values()
    for denoiser in denoisers:
        denoiser.set_attention_backend("fa3")
    assert_right(pipe, case)
    assert coverage(pipe).calls == sum(map(len, default(case).forwards))
    for denoiser in denoisers:
        denoiser.reset_attention_backend()
    assert {row.kernel for row in coverage(pipe).rows} == {"default"}


def test_enabling_a_pipeline_twice_counts_anew_and_is_undone_once() -> None:
    case = BY_NAME["qwenimage"]
    pipe = case.build()
    before = processors(pipe.transformer)
    enable(pipe, case)
    case.run(pipe)
    enable(pipe, case)
    assert coverage(pipe).calls == 0
    assert_right(pipe, case)
    assert coverage(pipe).calls == sum(map(len, default(case).forwards))
    disable_fa3(pipe)
    assert_same_objects(pipe.transformer, before)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("pixart_sigma", r"attn2$"),
        ("sd15_controlnet", r"^controlnet\."),
        ("sdxl_ip_adapter", r"^unet\.up_blocks"),
        ("wan22", r"^transformer_2\."),
    ],
)
def test_layers_are_chosen_by_the_names_that_the_report_shows(name: str, layers: str) -> None:
    case = BY_NAME[name]
    pipe = case.build()
    enable(pipe, case, layers=layers)
    assert_right(pipe, case)
    rows = coverage(pipe).rows
    assert {bool(re.search(layers, row.name)) for row in rows} == {True, False}
    for row in rows:
        chosen = re.search(layers, row.name) is not None
        assert row.kernel == ("reference" if chosen else "default")
        assert bool(row.calls) == chosen


def test_a_part_of_a_denoiser_is_switched_by_itself() -> None:
    case = BY_NAME["sdxl_ip_adapter"]
    pipe = case.build()
    enable(pipe.unet.mid_block, case)
    assert_right(pipe, case)
    for row in coverage(pipe).rows:
        assert bool(row.calls) == row.name.startswith("unet.mid_block.")
    assert coverage(pipe).calls == coverage(pipe.unet.mid_block).calls > 0
    disable_fa3(pipe)
    assert not switched(pipe.unet)


def test_what_is_not_a_denoiser_is_switched_when_it_is_given_by_itself() -> None:
    case = BY_NAME["sdxl"]
    pipe = case.build()
    pictures, reference = case.draw(pipe), case.draw(case.build(torch.float64))
    enable(pipe.vae, case)
    assert_within_budget(case.draw(pipe), pictures, reference)
    assert coverage(pipe.vae).calls == 1  # the decoder's call; the encoder does not run
    assert coverage(pipe).calls == 0


# --- what diffusers does to processors -----------------------------------------------------------


def test_an_ip_adapter_that_is_loaded_later_is_seen_and_switched_by_enabling_again() -> None:
    case, plain = BY_NAME["sdxl_ip_adapter"], BY_NAME["sdxl"]
    pipe = plain.build()
    enable(pipe, plain)
    stable_diffusion_xl.load_ip_adapter(pipe)
    assert all(row.kernel == "default" for row in coverage(pipe).rows)
    assert "enable_fa3 switches them again" in str(coverage(pipe))

    enable(pipe, case)
    case.run(pipe)
    assert coverage(pipe).calls == sum(map(len, default(case).forwards))
    pipe.unload_ip_adapter()
    enable(pipe, plain)
    assert_right(pipe, plain)


def test_the_scale_of_an_ip_adapter_is_set_on_a_switched_pipeline() -> None:
    case = BY_NAME["sdxl_ip_adapter"]
    pipe, double = case.build(), case.build(torch.float64)
    enable(pipe, case)
    assert_right(pipe, case)
    for each in (pipe, double):
        each.set_ip_adapter_scale(0.1)
    weaker, reference = case.run(pipe), case.run(double)
    assert error(reference, exact(case)) > 10 * budget(default(case).latents, exact(case))
    disable_fa3(pipe)
    assert_within_budget(weaker, case.run(pipe), reference)


@pytest.mark.parametrize("wrapped", [False, True], ids=["own", "wrapped"])
def test_perturbed_attention_guidance_takes_its_layers_away_unless_they_are_wrapped(
    wrapped: bool,
) -> None:
    """The guidance gives these layers its own processors during the call."""
    case = pixart.PERTURBED
    own = (PAGCFGIdentitySelfAttnProcessor2_0(), PAGIdentitySelfAttnProcessor2_0())
    ours = tuple(FA3AttnProcessor(p, kernel="reference", fallback="error") for p in own)
    pipe = case.build()
    if wrapped:
        pipe.set_pag_applied_layers(pipe.pag_applied_layers, ours)
    enable(pipe, case)
    assert_right(pipe, case)
    for row in coverage(pipe).rows:
        assert row.kernel == "reference"
        assert bool(row.calls) != row.name.endswith("blocks.1.attn1")
    assert [record_of(processor).calls.total() for processor in ours] == [2 * wrapped, 0]


# --- modular pipelines ---------------------------------------------------------------------------


def test_a_modular_pipeline_is_switched_when_its_denoiser_has_been_loaded(tmp_path: Path) -> None:
    needs(*ALL_PIPELINES)
    case = BY_NAME["qwenimage_modular"]
    BY_NAME["qwenimage"].build().save_pretrained(tmp_path)
    pipe = ModularPipeline.from_pretrained(str(tmp_path))
    with pytest.raises(UnsupportedModelError, match="no attention layer"):
        enable(pipe, case)
    pipe.load_components("transformer")
    enable(pipe, case)
    pipe.load_components()
    assert_right(pipe, case)
    assert coverage(pipe).calls == sum(map(len, default(case).forwards))


def test_another_component_is_not_switched_and_the_report_says_so() -> None:
    case = BY_NAME["qwenimage_modular"]
    pipe = case.build()
    enable(pipe, case)
    pipe.update_components(transformer=case.build().transformer)
    assert_right(pipe, case)
    assert {row.kernel for row in coverage(pipe).rows} == {"default"}


def test_pipelines_of_one_components_manager_share_the_switch() -> None:
    case = BY_NAME["qwenimage_modular"]
    manager = ComponentsManager()
    components = {name: part for name, part in case.build().components.items() if part is not None}
    one, two = modular.empty(manager), modular.empty(manager)
    one.update_components(**components)
    two.update_components(**manager.get_components_by_names(list(qwenimage.components())))
    enable(one, case)
    assert_right(two, case)
    assert coverage(two) == coverage(one)
    assert coverage(two).calls == coverage(manager).calls == sum(map(len, default(case).forwards))
