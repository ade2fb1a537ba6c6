"""What a mask means, and the plan that follows.

Read `meaning` first: the few things that a mask can mean to a kernel. `read` finds which of them it
is, `rows` where queries differ. `planning` makes the plan; `packing` is the plan, which packs and
unpacks. `plan_cache` finds a plan again. `outer` has mask types that spare laying out S x S.

Nothing here knows kernels or diffusers. Whatever is decided about a mask is decided here.
"""

from __future__ import annotations

from diffusers_fa3.masks.meaning import Opaque
from diffusers_fa3.masks.outer import SpreadMask, can_be_spread, sources_of
from diffusers_fa3.masks.packing import PackingPlan
from diffusers_fa3.masks.plan_cache import Plan, PlanCache, base_of
from diffusers_fa3.masks.planning import plan_packing, try_plan
from diffusers_fa3.masks.read import Axes2D

__all__ = [
    "Axes2D",
    "Opaque",
    "PackingPlan",
    "Plan",
    "PlanCache",
    "SpreadMask",
    "base_of",
    "can_be_spread",
    "plan_packing",
    "sources_of",
    "try_plan",
]
