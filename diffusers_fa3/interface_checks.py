"""What must hold of the arguments of FlashAttention's functions before a kernel sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusers_fa3.errors import InputError
from diffusers_fa3.options import is_default


def check_tensors(q: Tensor, k: Tensor, v: Tensor, rank: int, rank_k: int | None = None) -> None:
    """The shapes (..., H, D), (..., Hk, D), (..., Hk, Dv) belong together; `rank` counts axes."""
    if q.ndim != rank or {k.ndim, v.ndim} != {rank_k or rank}:
        raise InputError(
            f"q must have {rank} axes, keys and values {rank_k or rank}; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}. Drop or add an axis"
        )
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise InputError(
            "q and k must have one head size, k and v one length and number of heads; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}. Mind the order of axes: "
            "heads stand before the head size"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise InputError(
            f"q's number of heads must be a multiple of k's; got {q.shape[-2]} and {k.shape[-2]}. "
            "Mind the order of axes: heads stand before the head size"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(
            f"q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}. Cast them to one"
        )
    if not q.device == k.device == v.device:
        raise InputError(
            f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}. "
            "Move them to one"
        )


def check_new_keys(k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor) -> None:
    """New keys and values come together, and one of them is what one of the cache is."""
    if k is None or v is None:
        if k is not v:
            given = "v" if k is None else "k"
            raise InputError(
                f"k and v must be given together; got {given} alone. Give both or none"
            )
        return
    if k.shape[:-1] != v.shape[:-1]:
        raise InputError(
            f"k and v must be of one batch and length; got {tuple(k.shape)}, {tuple(v.shape)}. "
            "Give the new keys with their values"
        )
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if (new.shape[-2:], new.dtype, new.device) != (cache.shape[-2:], cache.dtype, cache.device):
            raise InputError(
                f"{name} must have the heads, head size, dtype and device of {name}_cache; got "
                f"{tuple(new.shape)}, {new.dtype}, {new.device} for {tuple(cache.shape)}, "
                f"{cache.dtype}, {cache.device}. Cast or move the new keys"
            )


def check_lengths(name: str, lengths: Tensor, q: Tensor, count: int | None) -> None:
    """`lengths` is int32 (count,), where q is; None is any number but 0."""
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int32 or lengths.ndim != 1:
        raise InputError(
            f"{name} must be an int32 tensor with one axis; got {_words(lengths)}. Give "
            "torch.tensor([...], dtype=torch.int32), where q is"
        )
    if lengths.device != q.device:
        raise InputError(f"{name} must be on {q.device}; got {lengths.device}. Move it there")
    if len(lengths) < 1 if count is None else len(lengths) != count:
        raise InputError(
            f"{name} must have {count or 'B + 1'} entries; got {len(lengths)}. Give one for "
            "each sample; a `cu_seqlens` begins with 0 and has one more"
        )


def _words(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return repr(value)


def read_window(window_size: tuple[int | None, int | None]) -> tuple[int, int]:
    """-1 on a side, whatever the sign was written with: FlashAttention-4 writes None."""
    left, right = (-1 if keys is None or keys < 0 else keys for keys in window_size)
    return left, right


def refuse_arguments(**arguments: Any) -> None:
    """Refuse those that ask for something."""
    asked = [name for name, value in arguments.items() if not is_default(value)]
    if asked:
        raise InputError(
            f"{', '.join(asked)}: not taken here, since not every kernel has it. Call without, or "
            "the kernel's own function"
        )
