"""Switched models beside other models, in several threads, and with diffusers' caches."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import hooks
from releases import has, needs
from switching import (
    BY_NAME,
    assert_on_the_kernel,
    expect,
    run,
    switched,
)
from tiny import LAYERS, pipeline
from torch import nn
from zoo import Case, Layout
from zoo.budget import assert_within_budget
from zoo.case import cast
from zoo.watch import watched

from diffusers_fa3 import (
    coverage,
    enable_fa3,
    flash_attn_varlen_func,
)

# --- threads -------------------------------------------------------------------------------------

FORWARDS = 500
HEAD = {"attention_head_dim": 16, "num_attention_heads": 1, "axes_dims_rope": (4, 6, 6)}


def doubled(q: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
    """A kernel whose results clearly differ from the reference's."""
    return 2 * flash_attn_varlen_func(q, *args, **options, kernel="reference")


def test_two_pipelines_in_two_threads_keep_to_themselves() -> None:
    """Each pipeline has its own kernel and its own masks, which every forward makes anew."""
    case = BY_NAME["qwenimage"]
    small = replace(case, config={**case.config, **HEAD})
    plans: list[tuple[object, tuple[Layout, ...]]] = [
        ("reference", ("gap", "right")),
        (doubled, ("left", "ragged", "gap")),
    ]
    models, expected, wrong = [], [], []
    for kernel, layouts in plans:
        model = small.build()
        enable_fa3(model, kernel=kernel, fallback="error")
        expected.append([small.run(model, layout) for layout in layouts])
        models.append(model)
    assert not torch.allclose(expected[0][0], expected[1][2], rtol=0.01)
    enable_fa3(models[0], kernel="reference", fallback="error")
    enable_fa3(models[1], kernel=doubled, fallback="error")

    def serve(which: int) -> None:
        layouts = plans[which][1]
        for i in range(FORWARDS):
            output = small.run(models[which], layouts[i % len(layouts)])
            if not torch.equal(output, expected[which][i % len(layouts)]):
                wrong.append((which, i))

    threads = [threading.Thread(target=serve, args=(which,)) for which in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    for model, kernel in zip(models, ("reference", "doubled")):
        report = coverage(model)
        assert (report.calls, report.fallbacks) == (2 * FORWARDS, 0)
        assert (report.plans_made, report.plans_reused) == (FORWARDS, FORWARDS)
        assert {row.kernel for row in report.rows} == {kernel}


# --- diffusers' caches ---------------------------------------------------------------------------

TIMES = (900, 700, 600, 400, 200)
"""Time steps: the caches skip attention in some of the later ones."""


class Moment:
    """The time step that a cache asks for."""

    now = 0


CACHES: dict[str, Callable[[], object]] = {
    "first_block": lambda: hooks.FirstBlockCacheConfig(threshold=10.0),
    "pyramid_attention_broadcast": lambda: hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: Moment.now
    ),
    "faster": lambda: hooks.FasterCacheConfig(
        current_timestep_callback=lambda: Moment.now,
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,
    ),
    "mag": lambda: hooks.MagCacheConfig(
        threshold=10.0, retention_ratio=0.0, num_inference_steps=len(TIMES), mag_ratios=[1.0] * 5
    ),
    "taylor_seer": lambda: hooks.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float64
    ),
    "sea": lambda: hooks.SeaCacheConfig(threshold=10.0),
}
SINCE = {"mag": "0.37", "taylor_seer": "0.37", "sea": "0.41"}


def denoised(case: Case, model: nn.Module, layout: Layout) -> torch.Tensor:
    """A model's outputs in a loop over the time steps, with the same mask in each."""
    inputs = cast(case.inputs(layout, 0.0), model.dtype)
    outputs = []
    for index, Moment.now in enumerate(TIMES):
        noisy = inputs["hidden_states"] * Moment.now / 1000
        where = {"step_index": index, "sigma": Moment.now / 1000, "num_inference_steps": len(TIMES)}
        where = where if has(SINCE["sea"]) else {}  # only the SEA cache needs them
        with torch.no_grad(), model.cache_context("cond", **where):
            output = model(**{**inputs, "hidden_states": noisy}, return_dict=False)
            outputs.append(case.pick(output))
    return torch.stack(outputs)


@pytest.mark.parametrize("switch_first", [True, False], ids=["switch-cache", "cache-switch"])
@pytest.mark.parametrize(
    ("name", "layout", "cache"),
    [
        *(("flux", "ragged", cache) for cache in CACHES if cache != "sea"),
        ("cogvideox", "none", "pyramid_attention_broadcast"),
        ("wan_t2v", "none", "sea"),
    ],
)
def test_a_cache_skips_the_calls_that_it_always_skips(
    name: str, layout: Layout, cache: str, switch_first: bool
) -> None:
    needs(SINCE.get(cache, "0.36"), "has no such cache")
    case = BY_NAME[name]

    def cached(dtype: torch.dtype = torch.float32) -> nn.Module:
        model = case.build(dtype)
        model.enable_cache(CACHES[cache]())
        return model

    with watched() as every:
        denoised(case, case.build(), layout)
    with watched() as log:
        default = denoised(case, cached(), layout)
    assert len(log.calls) < len(every.calls)

    model = case.build()
    for switch in (switch_first, not switch_first):
        if switch:
            enable_fa3(model, kernel="reference", fallback="error")
        else:
            model.enable_cache(CACHES[cache]())
    output = denoised(case, model, layout)
    assert_within_budget(output, default, denoised(case, cached(torch.float64), layout))
    assert coverage(model).calls == len(log.calls)
    model.disable_cache()
    assert_on_the_kernel(case, model, layout, expect(case, layout))


@pytest.mark.parametrize("switch_first", [True, False], ids=["switch-cache", "cache-switch"])
def test_cache_dit_skips_the_calls_that_it_always_skips(switch_first: bool) -> None:
    cache_dit = pytest.importorskip("cache_dit")

    def cache(pipe: object) -> None:
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=2,
            residual_diff_threshold=9.0,
        )
        cache_dit.enable_cache(pipe, cache_config=config)

    def images(pipe: object) -> torch.Tensor:
        return pipe(
            prompt_embeds=torch.linspace(-1, 1, 24).view(1, 3, 8),
            pooled_prompt_embeds=torch.linspace(-1, 1, 8).view(1, 8),
            latents=torch.linspace(-1, 1, 16).view(1, 4, 4),
            num_inference_steps=6,
            height=4,
            width=4,
            output_type="latent",
        ).images

    plain, pipe = pipeline(), pipeline()
    cache(plain)
    with watched() as log:
        default = images(plain)
    assert len(log.calls) < 6 * LAYERS
    for switch in (switch_first, not switch_first):
        if switch:
            enable_fa3(pipe, kernel="reference", fallback="error")
        else:
            cache(pipe)
    assert torch.equal(images(pipe), default)
    assert coverage(pipe).calls == len(log.calls)
    cache_dit.disable_cache(pipe)
    images(pipe)
    assert coverage(pipe).calls == len(log.calls) + 6 * LAYERS


# --- other models --------------------------------------------------------------------------------


def test_a_model_of_the_same_class_keeps_its_output_and_its_attention() -> None:
    case = BY_NAME["unet_sd15"]
    ours, other = case.build(), case.build()
    default = run(case, other, "gap")
    enable_fa3(ours, kernel=doubled, fallback="error")
    outputs = [run(case, model, "gap") for model in (ours, other, ours, other)]
    assert torch.equal(outputs[1], default)
    assert torch.equal(outputs[3], default)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], default)
    assert switched(other) == set()
