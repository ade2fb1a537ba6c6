"""The plans of models that make videos and sound."""

from __future__ import annotations

from diffusers_fa3.parallel.model_plan import ModelPlan

VIDEO: dict[str, ModelPlan] = {}

VIDEO_WHY_NOT: dict[str, str] = {}
"""Why a class can have no plan."""
