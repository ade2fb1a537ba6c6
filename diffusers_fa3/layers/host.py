"""What this package uses of diffusers' inner parts: all of it, in one place.

A release of diffusers in which one of them is missing is told so by name, before anything is
switched, instead of failing somewhere within.
"""

from __future__ import annotations

import functools
from importlib import import_module

import diffusers

from diffusers_fa3.errors import UnsupportedVersionError

TRIED = ("0.36.0", "0.42.1")
"""The oldest and the newest release of diffusers that the tests were run with."""

REQUIRED = (
    # calls.py and rebind.py: what processors call
    ("models.attention_dispatch", "dispatch_attention_fn"),
    # dispatcher.py: what `register` patches, and the rows of the process-wide registry
    ("models.attention", "AttentionModuleMixin.set_processor"),
    ("models.attention_dispatch", "AttentionBackendName.NATIVE"),
    ("models.attention_dispatch", "_AttentionBackendRegistry._active_backend"),
    ("models.attention_dispatch", "_AttentionBackendRegistry._backends"),
    ("models.attention_dispatch", "_AttentionBackendRegistry._constraints"),
    ("models.attention_dispatch", "_AttentionBackendRegistry._supported_arg_names"),
    ("models.attention_dispatch", "_AttentionBackendRegistry.register"),
    ("models.attention_processor", "Attention.set_processor"),
    ("models.modeling_utils", "ModelMixin.reset_attention_backend"),
    ("models.modeling_utils", "ModelMixin.set_attention_backend"),
)


def check() -> None:
    """See that the installed diffusers has all that is needed.

    Raises:
        UnsupportedVersionError: with the name, the release that is installed and those that work.
    """
    for module, path in REQUIRED:
        try:
            functools.reduce(getattr, path.split("."), import_module(f"diffusers.{module}"))
        except (ImportError, AttributeError) as error:
            raise UnsupportedVersionError(
                f"diffusers {diffusers.__version__} has no diffusers.{module}.{path}, which is "
                f"needed; diffusers {TRIED[0]} to {TRIED[1]} have it. Install one of those, or a "
                "newer diffusers-fa3"
            ) from error
