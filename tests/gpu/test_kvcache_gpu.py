"""Attention over a key-value cache on every kernel that has it: random calls against float64."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gpu.cache_calls import REFUSALS, Call, draw
from gpu.installed_kernels import usable
from torch import Tensor
from torch.nn import functional as F
from zoo.budget import assert_within_budget

from diffusers_fa3 import flash_attn_with_kvcache
from diffusers_fa3.errors import FA3Error
from diffusers_fa3.kernels.installed import kernel_named

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NAMES = [name for name in (*usable(), "reference") if kernel_named(name).kvcache is not None]
DRAWS = 100
"""Random calls of a test."""


@dataclass
class Expected:
    """What a call must give, in float64, and what PyTorch's attention gives in its dtype."""

    out: Tensor
    default: Tensor
    lse: Tensor
    k_cache: Tensor
    v_cache: Tensor


def expected(call: Call) -> Expected:
    """The definition, one sample at a time."""
    given = call.given
    packed = "cu_seqlens_q" in given
    k_cache, v_cache = given["k_cache"].clone(), given["v_cache"].clone()
    outs, defaults, lses = [], [], []
    for sample, (length, new) in enumerate(zip(call.lens, call.new_lens)):
        q = of_sample(given["q"], sample, call.q_lens, packed)
        if "rotary_cos" in given:
            first = length
            if "rotary_seqlens" in given:
                first = int(given["rotary_seqlens"][sample])
            # Without causal, all queries have one position.
            steps = torch.arange(len(q), device=q.device) * given.get("causal", False)
            q = rotated(q, first + steps, given)
        if new:
            k, v = (of_sample(given[n], sample, call.new_lens, packed) for n in ("k", "v"))
            if "rotary_cos" in given:
                k = rotated(k, first + torch.arange(new, device=k.device), given)
            slots = call.slots(sample, length, length + new)
            k_cache[slots], v_cache[slots] = k, v
        begin = int(given["cache_leftpad"][sample]) if "cache_leftpad" in given else 0
        slots = call.slots(sample, begin, length + new)
        qkv = (q, k_cache[slots], v_cache[slots])
        seen = seen_keys(len(q), length + new - begin, given).to(q.device)
        scale = given.get("softmax_scale", q.shape[-1] ** -0.5)
        softcap = given.get("softcap", 0.0)
        exact, lse = attend(*(x.double() for x in qkv), seen, scale, softcap)
        if softcap:  # which PyTorch's attention does not have
            default, _ = attend(*qkv, seen, scale, softcap)
        else:
            default = sdpa(*qkv, seen, scale)
        outs.append(exact)
        defaults.append(default)
        lses.append(lse)
    join = torch.cat if packed else torch.stack
    lse = torch.cat(lses, 1) if packed else torch.stack(lses)
    return Expected(join(outs), join(defaults), lse, k_cache, v_cache)


def of_sample(x: Tensor, sample: int, lens: list[int], packed: bool) -> Tensor:
    return x.split(lens)[sample] if packed else x[sample]


def seen_keys(q_len: int, k_len: int, given: dict[str, Any]) -> Tensor:
    """The (Sq, Sk) mask; a query's own key is that of the same distance from the end."""
    key, own = torch.arange(k_len), torch.arange(q_len)[:, None] + k_len - q_len
    seen = torch.ones(q_len, k_len, dtype=torch.bool)
    left, right = given.get("window_size", (-1, -1))
    if given.get("causal"):
        seen &= key <= own
    if left >= 0:
        seen &= key >= own - left
    if right >= 0:
        seen &= key <= own + right
    return seen


def rotated(x: Tensor, positions: Tensor, given: dict[str, Any]) -> Tensor:
    """(S, H, D) turned by the angles of its positions, and rounded as the cache is."""
    cos, sin = (given[name][positions, None].double() for name in ("rotary_cos", "rotary_sin"))
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width].double(), x[..., width:]
    if given["rotary_interleaved"]:
        a, b = turned[..., ::2], turned[..., 1::2]
        pair = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        pair = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([pair.to(x.dtype), rest], -1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """(Sq, H, D), (Sk, Hk, D), (Sk, Hk, Dv) -> (Sq, H, Dv), (H, Sq); 0 and -inf without a key."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1).masked_fill(~seen, 0.0)
    return torch.einsum("hqk,khd->qhd", weights, v), logits.logsumexp(-1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """The same by PyTorch, for the rows that see a key: its backends differ in the others."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    rows = seen.any(-1)
    if rows.any():
        heads_first = (x.transpose(0, 1)[None] for x in (q[rows], k, v))
        answer = F.scaled_dot_product_attention(*heads_first, attn_mask=seen[rows], scale=scale)
        out[rows] = answer[0].transpose(0, 1)
    return out


def is_served(name: str, call: Call) -> bool:
    """Whether a kernel serves a call, and then rightly; else that it says why, and leaves all."""
    given = call.given
    want = expected(call)
    before = given["k_cache"].clone(), given["v_cache"].clone()
    refusal = ""
    try:
        got = flash_attn_with_kvcache(**given, kernel=name)
    except FA3Error as error:
        refusal = str(error)
    if refusal:
        assert any(re.search(REFUSALS[extra], refusal) for extra in call.extras), refusal
        assert torch.equal(given["k_cache"], before[0])
        assert torch.equal(given["v_cache"], before[1])
        return False

    if given.keys() & {"return_lse", "return_softmax_lse"}:
        got, lse = got
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse.double(), want.lse, atol=2e-3, rtol=1e-4)
    assert isinstance(got, Tensor)
    assert "out" not in given or got is given["out"]
    assert_within_budget(got, want.default, want.out)
    # A rotated key may be rounded to the next number.
    rounding = {"atol": 1e-5, "rtol": 2**-7} if "rotary" in call.extras else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(given["k_cache"], want.k_cache, **rounding)
    assert torch.equal(given["v_cache"], want.v_cache)
    return True


def served_and_wrong(name: str, seed: int, device: str) -> tuple[Counter[bool], list[str]]:
    """How many of the calls a kernel served and refused, and those that went wrong."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    served, wrong = Counter[bool](), []
    for number in range(DRAWS):
        call = draw(rng, device)
        try:
            served[is_served(name, call)] += 1
        except (AssertionError, RuntimeError) as error:
            wrong.append(f"call {number}, {call}: {type(error).__name__}: {error}")
    return served, wrong


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_random_calls_over_a_cache(name: str, seed: int) -> None:
    served, wrong = served_and_wrong(name, seed, "cuda")
    assert not wrong, "\n".join(wrong)
    assert served[True] > DRAWS // 2, served
