"""What a FlashAttention-3 build was compiled with, from the flags that some builds ship."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import replace

import torch

from diffusers_fa3.kernels.contract import FLOAT8, HALF, Limits

FULL_BUILD = Limits(
    archs=("sm80", "sm90a"),
    dtypes=HALF | FLOAT8,
    # Builds have a few pairs of unequal head sizes, only for Hopper; no diffusers model uses one.
    head_dims_differ=False,
)
"""The limits of a FlashAttention-3 raw op, with every feature built. Raw ops have no backward."""

_HEAD_TILES = (256, 192, 128, 96, 64)


def read_flags(module: str) -> Mapping[str, bool]:
    """`CONFIG["build_flags"]` of a build's config module; empty if the build has no such module."""
    try:
        config = importlib.import_module(module).CONFIG
    except ModuleNotFoundError:
        return {}
    flags: Mapping[str, bool] = config["build_flags"]
    return flags


def limits_from(flags: Mapping[str, bool], full: Limits = FULL_BUILD) -> Limits:
    """`full` without the features that the flags disable."""

    def built(feature: str) -> bool:
        return not flags.get(f"FLASHATTENTION_DISABLE_{feature}", False)

    without = {
        *(() if built("FP16") else (torch.float16,)),
        *(() if built("FP8") else FLOAT8),
    }
    return replace(
        full,
        archs=full.archs if built("SM8x") else tuple(a for a in full.archs if a != "sm80"),
        dtypes=full.dtypes - without,
        max_head_dim=next((size for size in _HEAD_TILES if built(f"HDIM{size}")), 0),
        varlen=built("VARLEN"),
        seqused_k=built("VARLEN"),
        window=built("LOCAL"),
        softcap=built("SOFTCAP"),
        kvcache=built("APPENDKV"),
        page_table=built("PAGEDKV"),
    )


def backward_is_built(flags: Mapping[str, bool]) -> bool:
    """Whether the build's public functions have a backward."""
    return not flags.get("FLASHATTENTION_DISABLE_BACKWARD", False)


def version_of(module: str) -> str:
    """Name and version of the distribution that a module comes from; empty if there is none.

    The distribution may have another name than the module.
    """
    names = importlib.metadata.packages_distributions().get(module, [])
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in dict.fromkeys(names))
