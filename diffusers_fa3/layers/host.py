"""The diffusers internals that this package uses, all listed in one place.

If the installed diffusers lacks one of them, an error names it before anything is switched.
"""

from __future__ import annotations

import functools
from importlib import import_module

import diffusers

from diffusers_fa3.errors import UnsupportedVersionError

TRIED = ("0.36.0", "0.42.1")
"""The oldest and the newest diffusers release that the tests were run with."""

REQUIRED = (
    # calls.py and rebind.py: the function that processors call
    ("models.attention_dispatch", "dispatch_attention_fn"),
    # record.py: whether warnings are wanted
    ("utils.logging", "get_verbosity"),
    # dispatcher.py: the methods that `register` patches, and the process-wide backend registry
    ("models.attention", "AttentionModuleMixin.set_processor"),
    ("models.attention_dispatch", "AttentionBackendName.NATIVE"),
    ("models.attention_dispatch", "_AttentionBackendRegistry._active_backend"),
    ("models.attention_dispatch", "_AttentionBackendRegistry._backends"),
    ("models.attention_dispatch", "_AttentionBackendRegistry._constraints"),
    ("models.attention_dispatch", "_AttentionBackendRegistry._supported_arg_names"),
    ("models.attention_dispatch", "_AttentionBackendRegistry._supports_context_parallel"),
    ("models.attention_dispatch", "_AttentionBackendRegistry.register"),
    ("models.attention_processor", "Attention.set_processor"),
    # parallel/: how a model is split, and the hooks that split it
    ("hooks.context_parallel", "_CONTEXT_PARALLEL_INPUT_HOOK_TEMPLATE"),
    ("hooks.context_parallel", "_CONTEXT_PARALLEL_OUTPUT_HOOK_TEMPLATE"),
    ("hooks.context_parallel", "_get_submodule_by_name"),
    ("models._modeling_parallel", "ContextParallelInput"),
    ("models._modeling_parallel", "ContextParallelOutput"),
    ("models.modeling_utils", "ModelMixin._parallel_config"),
    ("models.modeling_utils", "ModelMixin.reset_attention_backend"),
    ("models.modeling_utils", "ModelMixin.set_attention_backend"),
)


def check() -> None:
    """Check that the installed diffusers has everything that `REQUIRED` lists.

    Raises:
        UnsupportedVersionError: a name is missing. The message gives the name, the installed
            release and the releases that work.
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
