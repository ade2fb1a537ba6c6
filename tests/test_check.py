"""`check` passes what is exact, names the layer and kernel of what is not, and changes nothing."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from command_line import exit_status
from diffusers import (
    DDIMScheduler,
    QwenImagePipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from digits_task import MODEL_DIR
from oracle import oracle
from PIL import Image
from pipelines.parts import PROMPTS, clip, clip_tokenizer, vae
from releases import QWENIMAGE_MASKS, needs
from torch import Tensor, nn
from zoo import CASES, Case
from zoo.case import cast
from zoo.unet import CONFIG, TEXT_WIDTH

from diffusers_fa3 import (
    InputError,
    KernelUnavailableError,
    UnsupportedModelError,
    coverage,
    enable_fa3,
    flash_attn_varlen_func,
)
from diffusers_fa3.tools.check import command
from diffusers_fa3.tools.check.arguments import arguments_of
from diffusers_fa3.tools.check.budget import Errors, Measured, measure
from diffusers_fa3.tools.check.check import check_parity
from diffusers_fa3.tools.check.drawn import Pictures
from diffusers_fa3.tools.check.exact import AttentionCall, exact_blocks
from diffusers_fa3.tools.check.loading import MOST, _shortened
from diffusers_fa3.tools.check.report import write_report
from diffusers_fa3.tools.check.runs import words_of
from diffusers_fa3.tools.check.sheet import amplification, sheet_of

BY_NAME = {case.name: case for case in CASES}
PIPELINES = {case.name: case for case in pipelines.CASES}

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def qwen(dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """A tiny Qwen-Image pipeline, two of whose prompts are padded, and its arguments."""
    needs(*QWENIMAGE_MASKS)
    case = PIPELINES["qwenimage"]
    return case.build(dtype), cast(case.inputs(), dtype)


def model_inputs(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {**cast(case.inputs(case.layouts[-1], 0.0), dtype), "return_dict": False}


# --- kernels, right and wrong --------------------------------------------------------------------

Kernel = Callable[..., Tensor]


def spoiled(spoil: Callable[[dict[str, Any]], None], after: Callable[[Tensor], Tensor]) -> Kernel:
    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
    ) -> Tensor:
        call = {
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_k": max_seqlen_k,
            "softmax_scale": softmax_scale,
        }
        spoil(call)
        return after(flash_attn_varlen_func(q, k, v, **call, kernel="reference"))

    return kernel


def named(name: str, kernel: Kernel) -> Kernel:
    kernel.__name__ = name
    return kernel


def without_last_key(call: dict[str, Any]) -> None:
    call["seqused_k"] = call["cu_seqlens_k"].diff() - 1


def all_samples_as_one(call: dict[str, Any]) -> None:
    for name in ("q", "k"):
        call[f"cu_seqlens_{name}"] = call[f"cu_seqlens_{name}"][[0, -1]]
        call[f"max_seqlen_{name}"] = int(call[f"cu_seqlens_{name}"][-1])


def one_nan(out: Tensor) -> Tensor:
    out = out.clone()
    out[-1, 0, 0] = torch.nan
    return out


def nothing(call: dict[str, Any]) -> None:
    pass


WRONG = (
    named("drops_the_last_key", spoiled(without_last_key, lambda out: out)),
    named("scales_by_1_01", spoiled(nothing, lambda out: out * 1.01)),
    named("mixes_samples", spoiled(all_samples_as_one, lambda out: out)),
    named("gives_nan", spoiled(nothing, one_nan)),
)


@every_dtype
def test_an_exact_kernel_passes(dtype: torch.dtype) -> None:
    pipe, inputs = qwen(dtype)
    parity = check_parity(pipe, inputs, kernel="reference")
    assert parity.passed, str(parity)
    layers = len(pipe.transformer.transformer_blocks)
    assert parity.calls == 2 * layers
    assert len(parity.layers) == layers
    assert len(parity.drawn.steps) == 2
    assert {call.route for layer in parity.layers for call in layer.calls} == {"packed"}
    assert "2 calls compared" not in str(parity)
    assert f"{2 * layers} calls compared with float64 on kernel reference: passed" in str(parity)
    assert "another default backend by" in str(parity)
    assert parity.pictures.default.shape == (2, 16, 16, 3)
    assert parity.coverage.calls == 2 * layers


@every_dtype
@pytest.mark.parametrize("kernel", WRONG, ids=lambda kernel: kernel.__name__)
def test_a_wrong_kernel_fails_and_layer_and_kernel_are_named(
    kernel: Kernel, dtype: torch.dtype
) -> None:
    pipe, inputs = qwen(dtype)
    parity = check_parity(pipe, inputs, kernel=kernel)
    assert not parity.passed
    layers = [layer.name for layer in parity.layers]
    assert layers
    assert len(parity.problems) >= len(layers)
    for name, problem in zip(layers, parity.problems):
        assert problem.startswith(f"{name}, call ")
        assert f"on {kernel.__name__} (packed): " in problem
    assert "FAILED" in str(parity)
    assert f"{len(parity.problems)} problems" in str(parity)


@pytest.mark.parametrize("kernel", WRONG, ids=lambda kernel: kernel.__name__)
def test_calls_get_the_inputs_of_a_run_on_the_default(kernel: Kernel) -> None:
    """The errors of one layer do not reach the next: the default's own errors stay the same."""

    def errors_of_default(kernel: Any) -> list[Errors]:
        pipe, inputs = qwen()
        parity = check_parity(pipe, inputs, kernel=kernel)
        return [call.measured.default for layer in parity.layers for call in layer.calls]

    assert errors_of_default(kernel) == errors_of_default("reference")


def test_nan_is_told_as_such() -> None:
    pipe, inputs = qwen()
    parity = check_parity(pipe, inputs, kernel=WRONG[-1])
    assert "the output is not finite where the default's is" in parity.problems[0]
    assert parity.problems[-1] == "the result on ours is not finite where the default's is"
    assert json.loads(json.dumps(parity.to_dict(), allow_nan=False))["passed"] is False


def test_a_kernel_that_raises_fails_the_check_and_the_run_goes_on() -> None:
    def raises(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any) -> Tensor:
        raise RuntimeError("out of order")

    pipe, inputs = qwen()
    parity = check_parity(pipe, inputs, kernel=raises)
    assert not parity.passed
    assert len(parity.problems) == len(parity.layers) == 2
    assert parity.problems[0].endswith("attn, on raises: raised RuntimeError: out of order")
    assert parity.layers[0].raised[1:]  # the second step came
    assert parity.drawn.result is None
    assert "RAISED" in str(parity)


def test_a_kernel_that_raises_later_fails_the_check_with_its_coverage() -> None:
    served = 0

    def raises_later(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any
    ) -> Tensor:
        nonlocal served
        served += 1
        if served > 5:  # four calls are compared
            raise RuntimeError("out of order")
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, len(q), len(k), kernel="reference"
        )

    pipe, inputs = qwen()
    parity = check_parity(pipe, inputs, kernel=raises_later)
    assert parity.problems == ("the run on kernel raises_later raised RuntimeError: out of order",)
    assert parity.calls == 4
    assert parity.coverage.calls == 1


def test_a_kernel_that_cannot_serve_the_calls_fails_if_it_was_asked_for() -> None:
    def dense_only(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> Tensor:
        raise AssertionError("never called")

    pipe, inputs = qwen()
    parity = check_parity(pipe, inputs, kernel=dense_only)
    assert not parity.passed
    assert "on dense_only: raised KernelUnavailableError" in parity.problems[0]


# --- calls that the default serves ---------------------------------------------------------------


def test_fallbacks_are_listed_and_fail_only_what_was_asked_for() -> None:
    case = BY_NAME["flux"]
    model, inputs = case.build(), model_inputs(case)
    first = next(m for m in model.modules() if hasattr(m, "processor"))
    first.processor._attention_backend = "_native_math"
    parity = check_parity(model, inputs)
    assert parity.passed, str(parity)
    assert [dict(layer.fallbacks) for layer in parity.layers if layer.fallbacks] == [
        {"the layer is set to backend _native_math, until reset_attention_backend": 1}
    ]
    assert "default attention, 1 times: the layer is set to backend" in str(parity)

    parity = check_parity(model, inputs, kernel="reference")
    assert not parity.passed
    (problem,) = parity.problems
    assert "the default attention served 1 calls, though kernel reference was asked for" in problem


def test_where_no_call_could_be_compared_nothing_is_passed() -> None:
    bias = torch.rand(1, 5, 5)
    inputs = {"hidden_states": torch.randn(1, 5, 8), "attention_mask": bias}
    parity = check_parity(Attention(query_dim=8, heads=2, dim_head=4), inputs)
    assert not parity.passed
    (problem,) = parity.problems
    assert problem.startswith("no attention call was served by a kernel, so none was compared: ")
    assert "a bias, not a mask" in problem


# --- models --------------------------------------------------------------------------------------


@pytest.mark.slow
@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_model_passes(case: Case, dtype: torch.dtype) -> None:
    parity = check_parity(case.build(dtype), model_inputs(case, dtype))
    assert parity.passed or not parity.calls, str(parity)
    if not case.refusal and not case.unreached:
        assert parity.calls


@pytest.mark.parametrize("name", ["chroma_bool_mask", "ltx", "pixart_sigma", "sd3", "wan22"])
def test_pipelines_of_other_families_pass(name: str) -> None:
    case = PIPELINES[name]
    parity = check_parity(case.build(), case.inputs())
    assert parity.passed, str(parity)
    assert len(parity.drawn.steps) == 2
    assert parity.pictures is not None
    assert parity.pictures.default.ndim == (5 if name in ("ltx", "wan22") else 4)
    assert parity.drawn.note == ""


def stable_diffusion() -> StableDiffusionPipeline:
    """A UNet with cross attention, whose text is padded and not masked."""
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=clip(TEXT_WIDTH),
        tokenizer=clip_tokenizer(),
        unet=UNet2DConditionModel(**CONFIG),
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_a_unet_passes_without_masks_and_without_arguments_but_prompts() -> None:
    parity = check_parity(stable_diffusion(), prompts=PROMPTS, steps=2)
    assert parity.passed, str(parity)
    calls = [call for layer in parity.layers for call in layer.calls]
    assert {call.route for call in calls} == {"dense"}
    assert {call.mask for call in calls} == {""}
    assert any(layer.name.endswith("attn2") for layer in parity.layers)
    assert {call.run for call in calls} == {0, 1}


class Closed(QwenImagePipeline):
    """A pipeline without a callback."""

    def __call__(
        self,
        prompt: list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 2,
        output_type: str = "pil",
        return_dict: bool = True,
        generator: Any = None,
    ) -> Any:
        return super().__call__(
            prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            output_type=output_type,
            return_dict=return_dict,
            generator=generator,
            true_cfg_scale=1.0,
        )


@pytest.mark.parametrize("kind", ["np", "pil"])
def test_a_pipeline_without_a_callback_is_compared_in_its_result(kind: str) -> None:
    pipe, _ = qwen()
    parity = check_parity(Closed(**pipe.components), {"output_type": kind}, steps=2)
    assert parity.passed, str(parity)
    assert parity.drawn.steps == ()
    assert parity.drawn.result is not None
    assert parity.drawn.note == "the pipeline does not hand out its latents by step"
    assert parity.pictures is not None


def test_only_selected_layers_are_checked() -> None:
    case = BY_NAME["unet_sd15"]
    parity = check_parity(case.build(), model_inputs(case), layers="attn2")
    assert parity.layers
    assert all(layer.name.endswith("attn2") for layer in parity.layers)


# --- nothing is changed --------------------------------------------------------------------------


def state(thing: Any) -> dict[str, Any]:
    """What a check may touch, by identity; without what models note in a forward of their own."""
    found: dict[str, Any] = {}
    components = list(getattr(thing, "components", {"": thing}).values())
    for number, root in enumerate(m for m in components if isinstance(m, nn.Module)):
        for name, module in root.named_modules():
            own = vars(module)
            found[f"{number}.{name}"] = {
                "ours": {key: value for key, value in own.items() if key.startswith("_fa3")},
                "hooks": {key: list(own[key].items()) for key in own if key.endswith("_hooks")},
                "processor": (getattr(module, "processor", None), own.get("processor")),
                "training": module.training,
                "modules": list(module._modules.items()),
                "forward": own.get("forward"),
            }
    if not isinstance(thing, nn.Module):
        found["pipe"] = dict(vars(thing))
        found["scheduler"] = {key: id(value) for key, value in vars(thing.scheduler).items()}
    return found


def test_a_pipeline_is_left_as_it_was() -> None:
    pipe, inputs = qwen()
    pipe(**inputs)  # transformers adds hooks in the first call
    before, random = state(pipe), torch.random.get_rng_state()
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    check_parity(pipe, inputs)
    assert state(pipe) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(weights[n], w) for n, w in pipe.transformer.state_dict().items())


@pytest.mark.parametrize("name", ["unet_sd15", "chroma"])
def test_a_model_in_training_mode_stays_in_it(name: str) -> None:
    case = BY_NAME[name]
    model = case.build().train()
    next(m for m in model.modules() if hasattr(m, "processor")).eval()
    before = state(model)
    check_parity(model, model_inputs(case))
    assert state(model) == before


def test_a_model_is_left_as_it_was_after_an_error() -> None:
    pipe, inputs = qwen()
    pipe(**inputs)
    before = state(pipe)

    def fails(module: nn.Module, args: Any, output: Any) -> None:
        raise ValueError("no such thing")

    hook = pipe.transformer.transformer_blocks[1].register_forward_hook(fails)
    with pytest.raises(InputError, match="must run on its default attention; got ValueError: no s"):
        check_parity(pipe, inputs)
    hook.remove()
    assert state(pipe) == before

    with pytest.raises(KernelUnavailableError, match="no kernel is called"):
        check_parity(pipe, inputs, kernel="nosuch")
    assert state(pipe) == before


@pytest.mark.parametrize("name", ["flux", "chroma"])
def test_a_switched_model_stays_switched_with_its_settings_and_counts(name: str) -> None:
    case = BY_NAME[name]
    model, inputs = case.build(), model_inputs(case)
    enable_fa3(model, kernel="reference", fallback="silent", layers=r"\.0\.attn")
    case.run(model, case.layouts[-1])
    before, report = state(model), coverage(model)
    parity = check_parity(model, inputs, kernel=WRONG[1])
    assert not parity.passed
    assert parity.coverage.rows[0].kernel in ("scales_by_1_01", repr(WRONG[1]))
    assert state(model) == before
    assert coverage(model) == report
    case.run(model, case.layouts[-1])
    assert coverage(model).calls == 2 * report.calls


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to:UserWarning")  # in diffusers 0.36
def test_a_compiled_model_is_compared_eagerly() -> None:
    case = BY_NAME["flux"]
    model = case.build()
    compiled = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model.compile(backend=backend)
    parity = check_parity(model, model_inputs(case))
    assert parity.passed, str(parity)
    assert all(layer.calls for layer in parity.layers)
    assert compiled  # where the whole is compared


# --- refusals ------------------------------------------------------------------------------------


def test_what_cannot_be_checked_is_refused_in_words() -> None:
    pipe, inputs = qwen()
    with pytest.raises(InputError, match=r"needs `inputs`.*got none for QwenImageTransformer2D"):
        check_parity(pipe.transformer)
    with pytest.raises(InputError, match="Give `seed` instead"):
        check_parity(pipe, {**inputs, "generator": torch.Generator()})
    with pytest.raises(InputError, match=r"Needy needs depth; got no such argument.*--set"):
        check_parity(Needy(**pipe.components))
    with pytest.raises(UnsupportedModelError, match="no attention layer"):
        check_parity(nn.Linear(2, 2), {"input": torch.zeros(1, 2)})
    with pytest.raises(
        InputError, match='a check compares a kernel with the default; got kernel="f'
    ):
        check_parity(pipe, inputs, kernel="fastest")
    pipe.transformer._parallel_config = object()
    with pytest.raises(InputError, match=r"check_parity runs on one process.*--ranks N"):
        check_parity(pipe, inputs)


def test_wrong_arguments_of_a_check_are_refused_in_words() -> None:
    pipe, _ = qwen()
    with pytest.raises(UnsupportedModelError, match=r"take a torch.nn.Module or a .*; got int"):
        check_parity(3)
    with pytest.raises(InputError, match="inputs is a dict of arguments by name; got list"):
        check_parity(pipe.transformer, [1])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="prompts must have at least one; got none"):
        check_parity(pipe, prompts=[])
    with pytest.raises(InputError, match="steps must be above 0; got 0"):
        check_parity(pipe, steps=0)


class Binning(QwenImagePipeline):
    """A pipeline that takes any argument, and enlarges small pictures if it is let."""

    def __call__(
        self, prompt: list[str], height: int = 8, use_resolution_binning: bool = True, **others: Any
    ) -> Any:
        raise AssertionError("never called")


def test_small_pictures_stay_small_and_misspelt_arguments_do_not_pass() -> None:
    pipe = Binning(**qwen()[0].components)
    assert arguments_of(pipe, None, None, 1)["use_resolution_binning"] is False
    assert "use_resolution_binning" not in arguments_of(pipe, {"height": 512}, None, 1)
    asked = arguments_of(pipe, {"use_resolution_binning": True}, None, 1)
    assert asked["use_resolution_binning"] is True
    with pytest.raises(InputError, match=r"Binning has no argument heigth; did you mean height\?"):
        arguments_of(pipe, {"heigth": 512}, None, 1)


class Needy(QwenImagePipeline):
    """A pipeline with an argument of its own."""

    def __call__(self, prompt: list[str], depth: int, generator: Any = None) -> Any:
        raise AssertionError("never called")


# --- float64 in blocks ---------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 4000, 2**28])
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "rows", "causal"])
def test_blocks_are_the_exact_attention(kind: str, limit: int) -> None:
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 7, 4, 8), torch.randn(2, 2, 7, 2, 8)
    seen = torch.rand(2, 1, 7 if kind == "rows" else 1, 7) < 0.6
    seen[..., 0] = True
    mask = {"none": None, "causal": None, "additive": torch.zeros(1).where(seen, -1e4)}
    allowed = mask.get(kind, seen)
    out, blocks = torch.full((2, 7, 4, 8), torch.nan, dtype=torch.float64), 0
    for block in exact_blocks(AttentionCall(q, k, v, allowed, None, kind == "causal"), limit):
        out[block.sample, block.rows, block.heads] = block.out
        blocks += 1
    assert blocks == {1: 56, 2**28: 2}.get(limit, blocks)
    if kind in ("none", "causal"):
        want = torch.stack([oracle(*x, 8**-0.5, kind == "causal")[0] for x in zip(q, k, v)])
    else:
        wide = [x.double().transpose(1, 2) for x in (q, k, v)]
        want = nn.functional.scaled_dot_product_attention(*wide, attn_mask=seen, enable_gqa=True)
        want = want.transpose(1, 2)
    torch.testing.assert_close(out, want)


def test_rows_without_keys_are_0_and_hidden_values_do_not_matter() -> None:
    q, k, v = torch.randn(3, 1, 5, 2, 8)
    mask = torch.tensor([True, True, True, True, False])[None, None, None].repeat(1, 1, 5, 1)
    mask[..., 2, :] = False
    k[:, 4] = v[:, 4] = torch.nan
    (block,) = exact_blocks(AttentionCall(q, k, v, mask))
    assert not block.out[2].any()
    assert block.out.isfinite().all()


def test_values_that_the_default_does_not_give_are_left_out_and_counted() -> None:
    q, k, v = torch.randn(3, 1, 5, 2, 8)
    right = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    default, ours = right.transpose(1, 2).clone(), right.transpose(1, 2)
    default[0, 3] = torch.nan
    measured = measure(AttentionCall(q, k, v), default, ours)
    assert measured.unknown == 16
    assert measured.share < 1
    assert math.isinf(measure(AttentionCall(q, k, v), ours, default).share)


def test_the_budget_is_twice_the_error_of_the_default_by_both_measures() -> None:
    def share(largest: float, typical: float) -> float:
        return Measured(Errors(0.1, 0.01), Errors(largest, typical), 0.0).share

    assert share(0.2, 0.01) == pytest.approx(1.0)
    assert share(0.1, 0.03) == pytest.approx(1.5)
    assert share(0.1, math.nan) == math.inf
    assert Measured(Errors(0.0, 0.0), Errors(0.0, 0.0), 1e-6).share == 0


# --- the report ----------------------------------------------------------------------------------

NUMBERS = {"largest", "typical"}


def test_the_dict_is_ready_for_json_and_its_keys_are_documented() -> None:
    pipe, inputs = qwen()
    found = json.loads(json.dumps(check_parity(pipe, inputs).to_dict(), allow_nan=False))
    (call, *_) = found["layers"][0]["calls"]
    assert found["schema"] == 1
    assert {*call["ours"]} == {*call["default"]} == {*call["allowed"]} == NUMBERS
    assert {*found["result"]} == {"ours", "other", "on_ranks"}
    assert found["arguments"]["latents"] == "float32 (2, 16, 16)"
    text = (Path(__file__).parents[1] / "docs" / "check.md").read_text()
    for key in {*found, *found["layers"][0], *call, *found["result"], *NUMBERS}:
        assert f"`{key}`" in text, key


def test_what_users_typed_is_escaped_and_the_page_needs_nothing_else(tmp_path: Path) -> None:
    pipe, inputs = qwen()
    inputs["prompt"] = ["<script>alert(1)</script>", "a & b"]
    parity = check_parity(pipe, inputs)
    write_report(parity, tmp_path / "new" / "folder", ["check", "x", "--prompt", "<b>'"])
    page = (tmp_path / "new" / "folder" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>" not in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "passed" in page
    with Image.open(tmp_path / "new" / "folder" / "report.png") as picture:
        assert picture.size[1] > picture.size[0] // 2
    assert json.loads((tmp_path / "new" / "folder" / "report.json").read_text())["passed"]


def test_a_failed_check_is_reported_with_its_problems(tmp_path: Path) -> None:
    pipe, inputs = qwen()
    for kernel in (WRONG[3], WRONG[0]):
        parity = check_parity(pipe, inputs, kernel=kernel)
        write_report(parity, tmp_path, ["check"])
        page = (tmp_path / "report.html").read_text()
        assert "Failed" in page
        assert kernel.__name__ in page


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    case = BY_NAME["unet_sd15"]
    parity = check_parity(case.build(), model_inputs(case))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the report goes into a folder; cannot write it"):
        write_report(parity, tmp_path / "file", ["check"])


def test_videos_are_shown_by_three_frames_and_small_pictures_enlarged() -> None:
    video = np.zeros((1, 9, 8, 8, 3))
    sheet = sheet_of(Pictures(video, video + 0.001), ["a"])
    assert sheet.size[1] > 3 * 256
    assert [amplification(x) for x in (0.0, 1.0, 0.02, 0.001, math.inf, math.nan)] == [
        *(1, 1, 10, 1000, 1, 1),
    ]


def test_arguments_are_told_in_words() -> None:
    told = words_of({"a": torch.zeros(2, 3), "b": ["x", 1, None], "c": DDIMScheduler})
    assert told == {"a": "float32 (2, 3)", "b": ["x", 1, None], "c": "type"}


# --- the command ---------------------------------------------------------------------------------


def test_the_digits_pass_and_the_report_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs(*QWENIMAGE_MASKS)
    assert (
        exit_status(
            "check", str(MODEL_DIR), "--device", "cpu", "--out", str(tmp_path), "--steps", "2"
        )
        == 0
    )
    said = capsys.readouterr()
    assert "reference (packed)" in said.out
    assert "float64 on kernel reference (asked for: auto): passed\nAll calls were on" in said.out
    page = (tmp_path / "report.html").read_text()
    assert "<p>All calls were on the reference, plain PyTorch: that says nothing of" in page
    assert said.out.endswith(f"report: {tmp_path / 'report.html'}\n")
    assert said.err == ""
    assert {file.name for file in tmp_path.iterdir()} == {
        "report.html",
        "report.json",
        "report.png",
    }


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    needs(*QWENIMAGE_MASKS)
    options = ("--json", "--steps", "1", "--dtype", "bf16", "--prompt", "seven", "--prompt", "a 4")
    size = ("--set", "height=16", "--set", "width=16")
    assert exit_status("check", str(MODEL_DIR), "--device", "cpu", *options, *size) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert found["arguments"]["prompt"] == ["seven", "a 4"]
    assert found["arguments"]["height"] == 16
    assert found["machine"]["dtype"] == "bfloat16"


def test_a_failed_check_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs(*QWENIMAGE_MASKS)
    from diffusers_fa3.tools.check import check

    usual = check.check_parity

    def with_wrong_kernel(*args: Any, **options: Any) -> Any:
        return usual(*args, **{**options, "kernel": WRONG[0]})

    monkeypatch.setattr(check, "check_parity", with_wrong_kernel)
    assert exit_status("check", str(MODEL_DIR), "--device", "cpu", "--steps", "1") == 1
    assert "FAILED, 3 problems" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["no/such/folder"], "MODEL must be a pipeline of diffusers that can be loaded"),
        (["no/such/folder"], "no such folder, and the hub has no such name or cannot be reached."),
        (
            [str(MODEL_DIR / "transformer")],
            "is a model, not a pipeline: give its parent folder, or",
        ),
        ([str(MODEL_DIR), "--set", "depth=3"], "has no argument depth; leave it out"),
        ([str(MODEL_DIR), "--set", "heigth=3"], "has no argument heigth; did you mean height?"),
        (
            [str(MODEL_DIR), "--set", "prompt=hi", "--prompt", "a"],
            "prompts are given once; got `pro",
        ),
        ([str(MODEL_DIR), "--set", "height=-1"], "by `inputs`, or by --set NAME=VALUE"),
        ([str(MODEL_DIR), "--set", "depth"], "NAME=VALUE; got depth"),
        ([str(MODEL_DIR), "--steps", "0"], "a number above 0; got 0"),
        ([str(MODEL_DIR), "--kernel", "fa3_fwd"], "fa3_fwd"),
        ([str(MODEL_DIR), "--kernel", "fa9"], "invalid choice"),
    ],
)
def test_what_cannot_run_exits_with_2(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("check", *options, "--device", "cpu") == 2
    assert says in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file", "file/inside"):
        assert (
            exit_status("check", "no/such/folder", "--device", "cpu", "--out", str(tmp_path / out))
            == 2
        )
        assert "the report goes into a folder; cannot write it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("False", False),
        ("True", True),
        ("None", None),
        ("false", False),
        ("3", 3),
        ("[1, 2]", [1, 2]),
        ("a cat", "a cat"),
    ],
)
def test_values_are_read_as_json_or_as_python_writes_them(text: str, value: object) -> None:
    assert command._assignment(f"name={text}") == ("name", value)


def test_a_pipeline_that_came_from_the_hub_and_does_not_load_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "a/file")
    assert exit_status("check", "no/such/folder", "--device", "cpu") == 2
    said = capsys.readouterr().err
    assert "got no/such/folder: " in said
    assert "the hub has no such name" not in said


def test_a_long_error_of_a_library_is_cut_at_a_sentence() -> None:
    assert _shortened("One. Two. " + "x" * MOST) == "One. Two."
    assert _shortened("x" * 2 * MOST) == "x" * MOST + " ..."
    assert _shortened("One. Two") == "One. Two"


def test_too_little_memory_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers_fa3.tools.check import check

    def too_large(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TB")

    monkeypatch.setattr(check, "check_parity", too_large)
    assert exit_status("check", str(MODEL_DIR), "--device", "cpu") == 2
    assert "more memory than the device has: CUDA out of memory. Ask" in capsys.readouterr().err


def test_the_bar_shows_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers_fa3.tools.check import progress

    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress.progress_bar() as advance:
        advance("layer by layer")
        advance("ours")
    assert stderr.getvalue() == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    with progress.progress_bar() as advance:
        advance("layer by layer")
    assert "layer by layer" in stderr.getvalue()


def test_the_command_is_known_without_loading_diffusers() -> None:
    code = (
        "import sys; from diffusers_fa3.tools import cli; cli._parser(); "
        "print([n for n in ('diffusers', 'rich', 'matplotlib', 'PIL') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
