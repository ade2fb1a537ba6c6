"""Attention over several GPUs: tokens that diffusers' context parallelism splits over ranks.

Reading order: `decide` tells whether a call is over split tokens, by diffusers' configuration and
by the plan of the model (`plans`) that a layer lives in (`home`). `attend` puts the sequence
together, takes the way of `attention.py`, and gives each rank its part. `exchange` is what ranks
send each other; `whole_mask` puts masks together. `plans_image` and `plans_video` have the plans of
models; `model_plan` says what is in a plan.
"""

from __future__ import annotations

from diffusers_fa3.parallel.attend import Memory, attend_split
from diffusers_fa3.parallel.decide import APPLIED, Split, split_of
from diffusers_fa3.parallel.exchange import distributed
from diffusers_fa3.parallel.home import Home
from diffusers_fa3.parallel.plans import cp_plan

__all__ = [
    "APPLIED",
    "Home",
    "Memory",
    "Split",
    "attend_split",
    "cp_plan",
    "distributed",
    "split_of",
]
