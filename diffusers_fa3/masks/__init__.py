"""What a mask means, and the plan for its attention call.

Reading order: `meaning` lists what a mask can mean to a kernel. `read` finds the meaning of a given
mask; `rows` does so for masks that depend on the query. `planning` makes a plan from the meaning;
`packing` is the plan itself, which packs and unpacks tensors. `plan_cache` reuses plans across
layers. `outer` has mask types that avoid laying out S x S.

These files know neither kernels nor diffusers. Every decision about a mask is made here.
"""

from __future__ import annotations

from diffusers_fa3.masks.meaning import Opaque
from diffusers_fa3.masks.outer import (
    OuterMask,
    SpreadMask,
    can_be_spread,
    is_in_factors,
    sources_of,
)
from diffusers_fa3.masks.packing import PackingPlan
from diffusers_fa3.masks.plan_cache import FindPlan, Plan, PlanCache, PlanCall, memory_of
from diffusers_fa3.masks.planning import plan_packing, try_plan
from diffusers_fa3.masks.read import Axes2D, as_4d

__all__ = [
    "Axes2D",
    "FindPlan",
    "Opaque",
    "OuterMask",
    "PackingPlan",
    "Plan",
    "PlanCache",
    "PlanCall",
    "SpreadMask",
    "as_4d",
    "can_be_spread",
    "is_in_factors",
    "memory_of",
    "plan_packing",
    "sources_of",
    "try_plan",
]
