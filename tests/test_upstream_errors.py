"""Three errors of diffusers' own varlen backends, which this package does not make.

1. gap: `_flash_varlen_3` takes the first n keys, not the n valid ones. Qwen-Image, Chroma, Krea 2
   and PRX put padding between text and image.
2. left padding: the same error at the other end.
3. query-dependent masks: every varlen backend reduces a (B, H, Sq, Sk) mask with `any` over the
   queries, so a causal mask becomes no mask.

The tests named "upstream" show what the installed diffusers does. If such a test fails, diffusers
has repaired the error: then delete the test and say so in the documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel
from diffusers.models import attention_dispatch
from releases import needs
from switching import BY_NAME
from torch.nn import functional
from zoo import Case, Layout
from zoo.budget import assert_within_budget, budget, error
from zoo.case import BATCH, randn, timesteps

from diffusers_fa3 import (
    attention,
    coverage,
    enable_fa3,
    flash_attn_varlen_func,
)

LENGTH = 12
HEADS = 2
HEAD_DIM = 32
REPAIRED = "diffusers has repaired this; delete the test and say so in the documentation"


def gap() -> torch.Tensor:
    """Return [text, pads, image] as Qwen-Image builds it, shape (B, 1, 1, Sk); ragged."""
    mask = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    mask[0, ..., 5:7] = False
    mask[1, ..., 2:7] = False
    return mask


def left() -> torch.Tensor:
    """Return [pads, text], shape (B, 1, 1, Sk); ragged."""
    return gap().roll(-2, dims=-1).flip(-1).sort(dim=-1).values


def causal() -> torch.Tensor:
    """Return a causal mask that is given as a tensor, shape (B, 1, Sq, Sk)."""
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(BATCH, 1, -1, -1)


def segments() -> torch.Tensor:
    """Return a block-diagonal mask of two segments, shape (B, 1, Sq, Sk)."""
    segment = torch.arange(LENGTH) // 5
    return (segment[:, None] == segment[None, :]).expand(BATCH, 1, -1, -1)


@dataclass(frozen=True)
class Keys:
    """Tensors (B, S, H, D) whose first key channel is the key's own position."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@pytest.fixture
def keys() -> Keys:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, BATCH, LENGTH, HEADS, HEAD_DIM, generator=generator)
    k[..., 0] = torch.arange(LENGTH)[:, None]
    q[..., 0] = 0.0  # positions label the keys, they take no part in the scores
    return Keys(q, k, v)


def sdpa(keys: Keys, mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (keys.q, keys.k, keys.v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("mask", [gap, left, causal, segments], ids=lambda f: f.__name__)
def test_attention_equals_sdpa(mask: Callable[[], torch.Tensor], keys: Keys) -> None:
    output = attention(keys.q, keys.k, keys.v, mask(), kernel="reference")
    assert_within_budget(output, sdpa(keys, mask()), sdpa(keys, mask(), torch.float64))


# --- whole models: ours against diffusers' backend on the same exact kernel ----------------------

SKYREELS = Case(
    name="skyreels_v2",
    model=SkyReelsV2Transformer3DModel,
    config={
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "num_frame_per_block": 2,  # frames see those of their own block and of earlier ones
    },
    inputs=lambda layout, pads: {
        "hidden_states": randn(BATCH, 4, 4, 4, 4),
        "timestep": timesteps(1000),
        "encoder_hidden_states": randn(BATCH, 6, 16, seed=1),
    },
)


def run_on_upstreams_varlen_backend(
    case: Case, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """The model on `_flash_varlen_3`, with exact mathematics in the place of its CUDA kernel."""

    needs("0.37", "expects two results of FlashAttention-3, which gives one")

    def kernel(**arguments: object) -> object:
        return flash_attn_varlen_func(**arguments, kernel="reference")

    monkeypatch.setattr(attention_dispatch, "flash_attn_3_varlen_func", kernel, raising=False)
    model = case.build()
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            module.processor._attention_backend = "_flash_varlen_3"
    return case.run(model, layout)


def check_that_upstream_is_wrong_and_ours_is_not(
    case: Case, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    default, exact = case.run(case.build(), layout), case.exact(layout)
    upstream = run_on_upstreams_varlen_backend(case, layout, monkeypatch)
    assert error(upstream, exact) > 100 * budget(default, exact), REPAIRED
    ours = case.build()
    enable_fa3(ours, kernel="reference", fallback="silent")
    assert_within_budget(case.run(ours, layout), default, exact)
    report = coverage(ours)
    assert report.calls > 0
    assert report.fallbacks == 0


def test_a_gap_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_upstream_is_wrong_and_ours_is_not(BY_NAME["qwenimage"], "right", monkeypatch)


def test_left_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_upstream_is_wrong_and_ours_is_not(BY_NAME["qwenimage"], "left", monkeypatch)


def test_a_query_dependent_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_upstream_is_wrong_and_ours_is_not(SKYREELS, "none", monkeypatch)


def test_without_a_mask_upstreams_backend_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """This calibrates the three tests above: the stand-in kernel itself is exact."""
    case = BY_NAME["qwenimage"]
    default, exact = case.run(case.build(), "none"), case.exact("none")
    upstream = run_on_upstreams_varlen_backend(case, "none", monkeypatch)
    assert_within_budget(upstream, default, exact)


# --- what upstream does today -----------------------------------------------------------------


@pytest.mark.parametrize("mask", [gap, left], ids=lambda f: f.__name__)
def test_upstream_packs_the_first_keys_instead_of_the_valid_ones(
    mask: Callable[[], torch.Tensor], keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = []

    def kernel(**arguments: torch.Tensor) -> torch.Tensor:
        packed.append(arguments["k"][:, 0, 0].long())
        return arguments["q"]

    monkeypatch.setattr(attention_dispatch, "flash_attn_3_varlen_func", kernel, raising=False)
    attention_dispatch._flash_varlen_attention_3(keys.q, keys.k, keys.v, attn_mask=mask())

    valid = mask()[:, 0, 0].nonzero()[:, 1]
    first = torch.cat([torch.arange(int(n)) for n in mask().sum(-1).flatten()])
    assert torch.equal(packed[0], first), REPAIRED
    assert not torch.equal(packed[0], valid), REPAIRED


@pytest.mark.parametrize("mask", [causal, segments], ids=lambda f: f.__name__)
def test_upstream_reduces_a_query_dependent_mask_to_no_mask(
    mask: Callable[[], torch.Tensor],
) -> None:
    reduced = attention_dispatch._normalize_attn_mask(mask(), BATCH, LENGTH)
    assert reduced.all(), REPAIRED
