"""Defaults by environment variables, and diffusers' verbosity."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.utils import logging

from diffusers_fa3 import (
    FA3AttnProcessor,
    FallbackWarning,
    InputError,
    KernelUnavailableError,
    coverage,
    enable_fa3,
    register,
)
from diffusers_fa3.layers.record import Settings

KERNEL, FALLBACK = "DIFFUSERS_FA3_KERNEL", "DIFFUSERS_FA3_FALLBACK"
BIAS = torch.rand(1, 5, 5)  # for every query and key: no kernel takes it


def layer() -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=8, heads=2, dim_head=4, processor=AttnProcessor2_0())


def run(switched: Attention) -> None:
    with torch.no_grad():
        switched(torch.randn(1, 5, 8), attention_mask=BIAS)


def test_the_kernel_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNEL, "reference")
    switched = layer()
    enable_fa3(switched)
    assert switched.processor._fa3.settings.kernel == "reference"
    assert FA3AttnProcessor(AttnProcessor2_0())._fa3.settings.kernel == "reference"


def test_an_empty_value_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNEL, "")
    monkeypatch.setenv(FALLBACK, "")
    assert Settings.asked(None, None) == Settings("auto", "warn")


def test_what_is_given_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNEL, "no such kernel")
    monkeypatch.setenv(FALLBACK, "no such word")
    enable_fa3(layer(), kernel="auto", fallback="silent")


@pytest.mark.parametrize("ask", [lambda: enable_fa3(layer()), FA3AttnProcessor, register])
@pytest.mark.parametrize(
    ("variable", "value", "error", "words"),
    [
        (KERNEL, "fa4x", KernelUnavailableError, "DIFFUSERS_FA3_KERNEL=fa4x: .*fa4x"),
        (FALLBACK, "warm", InputError, "DIFFUSERS_FA3_FALLBACK=warm: fallback is one of"),
    ],
)
def test_an_unknown_value_is_an_error_that_names_the_variable(
    ask: object,
    variable: str,
    value: str,
    error: type[Exception],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    assert callable(ask)
    with pytest.raises(error, match=words):
        ask()


def test_the_fallback_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FALLBACK, "error")
    switched = layer()
    enable_fa3(switched)
    with pytest.raises(InputError, match="a bias"):
        run(switched)


def test_warnings_come_once_for_each_reason_and_not_below_diffusers_verbosity() -> None:
    before = logging.get_verbosity()
    switched = layer()
    enable_fa3(switched)
    try:
        logging.set_verbosity_error()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(switched)
        logging.set_verbosity_warning()
        with pytest.warns(FallbackWarning, match="a bias"):
            run(switched)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(switched)
    finally:
        logging.set_verbosity(before)
    assert sum(coverage(switched).rows[0].fallbacks.values()) == 3
