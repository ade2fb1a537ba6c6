"""Arguments that more than one command takes."""

from __future__ import annotations

import argparse

import torch

from diffusers_fa3.kernels import PROVIDERS

KERNELS = ("auto", *(provider.name for provider in PROVIDERS))
"""What `--kernel` takes."""


def add_device(group: argparse._ActionsContainer) -> None:
    """Add `--device`, cuda where there is one; cuda where there is none is an error at once."""
    devices = ("cpu", "cuda")
    usual = devices[torch.cuda.is_available()]
    group.add_argument("--device", default=usual, choices=devices, type=_present)


def _present(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            "cuda needs a CUDA device, and torch sees none; give --device cpu"
        )
    return device


def positive(text: str) -> int:
    """The number above 0 that an argument gives."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"a number above 0; got {text}")
    return int(text)
