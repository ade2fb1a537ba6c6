"""Attention calls as diffusers' models make them: sizes, masks and inputs."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor

from diffusers_fa3.errors import InputError
from diffusers_fa3.masks import PackingPlan, plan_packing
from diffusers_fa3.options import Lengths

SHARES = (None, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of the text tokens that are valid; None: no mask."""
ROTATED = 256 * 2**20
"""Bytes that the input sets of one measurement fill together: several times a GPU's cache."""


@dataclass(frozen=True)
class Case:
    """One attention call: B samples of text and image tokens, H heads of size D."""

    name: str
    batch: int
    text: int
    image: int
    heads: int
    head_dim: int
    shares: tuple[float | None, ...] = (None,)
    gap: bool = False
    """Padding lies between text and image; else it lies at the end."""
    outer: bool = False
    """The mask is the (B, 1, S, S) outer product of the valid tokens; else (B, 1, 1, S)."""
    cross: bool = False
    """Queries are the image and keys the text; else both are text and image."""
    pattern: Literal["", "frames", "segments", "window"] = ""
    """The pattern of a (1, 1, S, S) mask. "frames": five blocks of frames, each of which sees
    itself and earlier blocks. "segments": three segments that do not see each other. "window": a
    window of 1/24 of the keys to either side. Empty: key padding."""
    kv_heads: int | None = None
    """Heads of k and v before the model expands them to H."""
    most_rounds: int | None = None

    @property
    def q_len(self) -> int:
        """Sq."""
        return self.image if self.cross else self.text + self.image

    @property
    def k_len(self) -> int:
        """Sk."""
        return self.text if self.cross else self.text + self.image

    @property
    def pairs(self) -> int:
        """B * Sq * Sk."""
        return self.batch * self.q_len * self.k_len

    @property
    def pads_are_queries(self) -> bool:
        """Whether padded tokens are also queries, which `pack_queries` can leave out."""
        return not (self.cross or self.outer or self.pattern)

    def small(self) -> Case:
        """The same case, small enough for a quick run on a CPU."""
        text, image = (n and max(16, n // 64) for n in (self.text, self.image))
        heads, kv_heads = 4, self.kv_heads and 2
        return replace(self, text=text, image=image, heads=heads, kv_heads=kv_heads)

    def of_length(self, tokens: int) -> Case:
        """The same case with `tokens` text and image tokens, in about the same proportion."""
        text = round(tokens * self.text / (self.text + self.image))
        return replace(self, text=text, image=tokens - text)

    def mask(self, share: float | None, device: str) -> Tensor | None:
        """The bool mask, True: seen. Samples have 0.5 to 1.5 times `share` of valid text."""
        if share is None:
            return None
        if self.pattern:
            return self.pattern_mask(device)
        spread = torch.linspace(0.5, 1.5, self.batch)
        if share == 1 or self.batch == 1:
            spread = torch.ones(self.batch)
        lengths = (self.text * share * spread).round().clamp(1, self.text).int()[:, None]
        position = torch.arange(self.k_len)
        if self.gap:
            seen = (position < lengths) | (position >= self.text)
        else:
            seen = position < lengths + self.image
        seen = seen.to(device)
        if self.outer:
            return seen[:, None, :, None] & seen[:, None, None, :]
        return seen[:, None, None]

    def pattern_mask(self, device: str) -> Tensor:
        """The (1, 1, S, S) bool mask of `pattern`."""
        position = torch.arange(self.k_len, device=device)
        if self.pattern == "window":
            distance = (position[:, None] - position).abs()
            return (distance <= self.k_len // 24)[None, None]
        parts = 5 if self.pattern == "frames" else 3
        part = position * parts // self.k_len
        seen = torch.ge if self.pattern == "frames" else torch.eq
        return seen(part[:, None], part)[None, None]

    def plan(
        self, mask: Tensor | None, *, seqused: bool = True, pack_queries: bool = False
    ) -> PackingPlan:
        """The plan for the mask; the options are those of `plan_packing`."""
        return plan_packing(
            mask,
            batch=self.batch,
            q_len=self.q_len,
            k_len=self.k_len,
            seqused=seqused,
            pack_queries=pack_queries,
        )

    def packed_plan(self, mask: Tensor | None, device: str) -> PackingPlan:
        """A plan on route packed, even if the mask could take another route."""
        plan = self.plan(mask, seqused=False)
        if plan.route == "packed":
            return plan
        samples = torch.arange(self.batch + 1, dtype=torch.int32, device=device)
        return replace(
            plan,
            route="packed",
            lengths=Lengths(samples * self.q_len, samples * self.k_len, self.q_len, self.k_len),
            indices_k=torch.arange(self.batch * self.k_len, device=device),
        )

    def needed_pairs(self, mask: Tensor | None, pack_queries: bool = False) -> int:
        """The number of pairs of a query and a key that it sees: the sum of q_i * k_i."""
        if mask is None:
            return self.pairs
        if pack_queries:
            return int(mask.sum(-1).square().sum())
        return int(mask.sum()) * (self.pairs // mask.numel())


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call, in each layout that some method takes."""

    qkv: tuple[Tensor, Tensor, Tensor]
    """(B, S, H, D)."""
    heads_first: tuple[Tensor, Tensor, Tensor]
    """Views of `qkv`, (B, H, S, D)."""
    packed: tuple[Tensor, Tensor, Tensor]
    """The valid tokens of `qkv`, (T, H, D)."""
    mask: Tensor | None


def make_inputs(
    case: Case, mask: Tensor | None, packed: PackingPlan, dtype: torch.dtype, device: str
) -> list[Inputs]:
    """Enough input sets that none is still in the cache when its turn comes again; 2 to 16."""
    element = torch.empty((), dtype=dtype).element_size()
    tokens = case.q_len + 2 * case.k_len
    size = 2 * case.batch * tokens * case.heads * case.head_dim * element
    count = min(max(math.ceil(ROTATED / size), 2), 16)
    return [make_set(case, mask, packed, dtype, device) for _ in range(count)]


def make_set(
    case: Case, mask: Tensor | None, packed: PackingPlan, dtype: torch.dtype, device: str
) -> Inputs:
    """One input set. All sets share the mask tensor, as the layers of a model do."""
    kv_heads = case.kv_heads or case.heads
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    q = torch.randn(case.batch, case.q_len, case.heads, case.head_dim, **like)
    k, v = torch.randn(2, case.batch, case.k_len, kv_heads, case.head_dim, **like).unbind()
    if kv_heads != case.heads:
        k, v = (x.repeat_interleave(case.heads // kv_heads, dim=2) for x in (k, v))
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return Inputs((q, k, v), heads_first, packed.pack(q, k, v), mask)


def mask_bytes(case: Case) -> int:
    """Bytes needed for an S x S mask: as bool, as additive in 2 bytes, and copies of both; or 0."""
    return 8 * case.batch * case.q_len * case.k_len if case.outer or case.pattern else 0


CASES = (
    Case("padding", 4, 512, 1024, heads=8, head_dim=64, shares=SHARES, gap=True),
    Case("flux", 1, 512, 4096, heads=24, head_dim=128),
    Case("qwenimage", 2, 512, 4096, heads=24, head_dim=128, shares=SHARES, gap=True),
    Case("lumina2", 2, 256, 4096, heads=24, head_dim=96, kv_heads=8, shares=(0.5,)),
    Case("sdxl-self", 2, 0, 4096, heads=10, head_dim=64),
    Case("sdxl-cross", 2, 77, 4096, heads=10, head_dim=64, cross=True),
    Case("wan", 1, 0, 32760, heads=12, head_dim=128, most_rounds=11),
    Case("hunyuanvideo15", 1, 2000, 48000, 16, 128, shares=(9 / 2000,), most_rounds=5),
    Case("hunyuanvideo15-outer", 1, 2000, 48000, 16, 128, (9 / 2000,), outer=True, most_rounds=5),
    Case("skyreelsv2", 1, 0, 39000, 12, 128, (1.0,), pattern="frames", most_rounds=5),
    Case("ideogram4", 1, 512, 4096, 18, 256, (1.0,), pattern="segments"),
    Case("scale", 1, 4096, 0, heads=8, head_dim=64, shares=SHARES),
    Case("acestep", 2, 0, 3000, 16, 128, (1.0,), pattern="window", kv_heads=8),
)


def cases_of(model: str) -> tuple[Case, ...]:
    """The cases of a model, given the name of a case or of a diffusers class.

    A class without its own case gets 512 text tokens before 4,096 image tokens, and the default
    heads of its configuration.

    Raises:
        InputError: the name is neither, or the class's configuration does not give its heads.
    """
    name = model.lower()
    stem = re.sub(r"transformer[123]dmodel$", "", name)
    known = tuple(c for c in CASES if c.name == name or c.name.partition("-")[0] == stem)
    return known or (_case_of_class(model),)


def _case_of_class(model: str) -> Case:
    names = [model, *(f"{model}Transformer{axes}DModel" for axes in (2, 3, 1))]
    found = next((getattr(diffusers, name) for name in names if hasattr(diffusers, name)), None)
    parameters = {} if found is None else inspect.signature(found).parameters
    sizes = [
        parameters[name].default
        for name in ("num_attention_heads", "attention_head_dim")
        if name in parameters
    ]
    if len(sizes) < 2 or not all(isinstance(size, int) for size in sizes):
        stems = ", ".join(dict.fromkeys(case.name.partition("-")[0] for case in CASES))
        raise InputError(
            f"model is one of {stems}, or a class of diffusers whose configuration says "
            f"num_attention_heads and attention_head_dim; got {model}. Give heads, head size, text "
            "and image tokens in place of a model"
        )
    heads, head_dim = sizes
    return Case(model, 1, 512, 4096, heads, head_dim, shares=SHARES, gap=True)
