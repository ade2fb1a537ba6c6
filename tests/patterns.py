"""Masks that depend on the query and can still be packed, as diffusers' models pass them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_fa3.masks.meaning import AllValid, Band, Meaning, Sequences, Valid

B, S = 2, 24


def square() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool)


def segments(of: Tensor) -> Tensor:
    """Queries see the keys of their own segment."""
    return of[:, None] == of[None, :]


def refiner() -> Tensor:
    """outer(valid, valid), with the first key seen by all queries: HunyuanVideo's token refiner."""
    valid = torch.arange(S)[None] < torch.tensor([[20], [9]])
    mask = valid[:, None, :, None] & valid[:, None, None, :]
    mask[..., 0] = True
    return mask


def padded_causal() -> Tensor:
    """Causal, and the last keys of one sample are padding: the prior of unCLIP."""
    return torch.stack([square().tril() & (torch.arange(S) < 17), square().tril()])[:, None]


def text_and_image() -> Tensor:
    """[pads, causal text, image that sees text and image], as in OmniGen."""
    mask = torch.zeros(B, 1, S, S, dtype=torch.bool)
    for sample, (pads, text) in zip(mask[:, 0], [(5, 8), (0, 11)]):
        image = pads + text
        sample[pads:image, pads:image] = torch.ones(text, text).tril().bool()
        sample[image:, pads:] = True
        sample[:pads] = True
    return mask


PATTERNS: dict[str, tuple[Callable[[], Tensor], Meaning | int]] = {
    "causal": (lambda: square().tril(), Band(-1, 0)),
    "causal suffix": (lambda: torch.ones(S - 9, S, dtype=torch.bool).tril(9), Band(-1, 0)),
    "anti-causal": (lambda: square().triu(), Band(0, -1)),
    "sliding window": (lambda: square().tril(2) & square().triu(-4), Band(4, 2)),
    "window to one side": (lambda: square().tril() & square().triu(-4), Band(4, 0)),
    "segments": (lambda: segments(torch.arange(S) // 10), 3),
    "mixed segments": (lambda: segments(torch.arange(S) % 3), 3),
    "blocks of frames": (lambda: (torch.arange(S) // 8)[:, None] >= torch.arange(S) // 8, 3),
    "strictly causal": (lambda: square().tril(-1), 1),
    "causal from the top": (lambda: torch.ones(S - 9, S, dtype=torch.bool).tril(), 1),
    "rows in pairs": (lambda: (torch.arange(4) // 2 * 2 + 1)[:, None] >= torch.arange(4), 2),
    "refiner": (refiner, 4),
    "padded causal": (padded_causal, 3),
    "causal text and image": (text_and_image, 5),
}
"""A (Sq, Sk) or (B, 1, Sq, Sk) mask, and its meaning or its number of groups of queries."""


def rebuilt(meaning: Meaning, sizes: tuple[int, int, int, int]) -> Tensor:
    """The (B, H, Sq, Sk) bool mask that a meaning stands for."""
    mask = torch.zeros(sizes, dtype=torch.bool)
    batch, _, q_len, k_len = sizes
    match meaning:
        case AllValid():
            mask[:] = True
        case Valid():
            every = torch.ones(1, q_len, dtype=torch.bool)
            queries = every if meaning.queries is None else meaning.queries
            mask[:] = queries[:, None, :, None] & meaning.keys[:, None, None, :]
        case Band(left, right):
            offset = torch.arange(k_len) - torch.arange(k_len - q_len, k_len)[:, None]
            mask[:] = (offset <= right if right >= 0 else offset <= k_len) & (
                offset >= -left if left >= 0 else offset >= -k_len - q_len
            )
        case Sequences(sequences, samples):
            for one in sequences:
                rows = torch.zeros(len(one.queries), k_len, dtype=torch.bool)
                rows[:, one.keys] = True
                if one.causal:
                    hidden = torch.ones(len(one.queries), len(one.keys)).triu(
                        len(one.keys) - len(one.queries) + 1
                    )
                    rows[:, one.keys] &= hidden == 0
                mask[one.sample if samples == batch else slice(None), :, one.queries] = rows
    return mask
