"""Every model class of diffusers that attends is in the zoo, or named here with a reason."""

from __future__ import annotations

import inspect

import pytest
from diffusers import ModelMixin, models
from releases import has
from zoo import KNOWN, MISSING

from diffusers_fa3.layers import host

FAMILIES = tuple(f"diffusers.models.{kind}" for kind in ("transformers", "unets", "controlnets"))
"""Where diffusers keeps its denoisers. Its VAEs, text encoders and vocoders are not switched."""

SEVERAL = "several controlnets, which are switched one by one"
NOT_HERE = {
    "ControlNetXSAdapter": "weights of UNetControlNetXSModel, which has the layers",
    "FluxMultiControlNetModel": SEVERAL,
    "HunyuanDiT2DMultiControlNetModel": SEVERAL,
    "MotionAdapter": "weights of UNetMotionModel, which has the layers",
    "MultiControlNetModel": SEVERAL,
    "MultiControlNetUnionModel": SEVERAL,
    "QwenImageMultiControlNetModel": SEVERAL,
    "SD3MultiControlNetModel": SEVERAL,
    "Transformer2DModel": "the blocks of UNet2DConditionModel; PixArt and DiT have their own class",
    "UNet1DModel": "attention written by hand, without a processor",
}


def exported() -> set[str]:
    """Names of the denoisers that the installed diffusers exports."""
    found = (getattr(models, name) for name in dir(models) if name[0].isupper())
    return {
        model.__name__
        for model in found
        if inspect.isclass(model)
        and issubclass(model, ModelMixin)
        and model.__module__.startswith(FAMILIES)
    }


def in_the_zoo() -> set[str]:
    return {base.__name__ for case in KNOWN for base in case.model.__mro__}


def test_no_model_class_is_unknown() -> None:
    unknown = exported() - in_the_zoo() - NOT_HERE.keys()
    assert not unknown, f"diffusers exports {sorted(unknown)}: add a case to the zoo for each"


def test_only_an_older_diffusers_lacks_a_case() -> None:
    assert not MISSING or not has(host.TRIED[1]), MISSING


def test_what_is_left_out_is_left_out() -> None:
    assert not in_the_zoo() & NOT_HERE.keys()


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_is_left_out_exists(name: str) -> None:
    assert name in exported()
