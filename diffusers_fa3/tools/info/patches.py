"""Functions of diffusers that come from elsewhere: seen by the module that their code is in.

`__module__` does not tell, since `functools.wraps` copies it; a function's globals do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

ALLOWED = {
    *sys.stdlib_module_names,
    *("diffusers", "diffusers_fa3", "torch", "accelerate", "transformers", "peft"),
    *("huggingface_hub", "numpy", "typing_extensions", "importlib_metadata"),
}
"""Packages whose functions are in diffusers' classes by diffusers' own doing, or by ours."""


def patched_in_diffusers() -> dict[str, list[str]]:
    """Package -> what it replaced in the modules of diffusers that are loaded."""
    found: dict[str, list[str]] = {}
    for where, function in (*_functions(), *_backends()):
        module = module_of(function)
        package = module.partition(".")[0]
        # Code that was made as text, as a named tuple's, has a module that nobody loaded.
        if package not in ALLOWED and module in sys.modules:
            found.setdefault(package, []).append(where)
    return found


def module_of(function: Any) -> str:
    """The module in which a function was written."""
    inner = getattr(function, "__globals__", None)
    name = inner.get("__name__") if inner is not None else getattr(function, "__module__", None)
    return str(name or type(function).__module__)


def _functions() -> Iterator[tuple[str, Any]]:
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.") and isinstance(module, ModuleType):
            yield from _functions_in(name, module)


def _functions_in(name: str, module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The methods of a module's own classes, and the function that asks for a backend."""
    # A copy: other threads may import meanwhile.
    for thing_name, thing in list(vars(module).items()):
        if thing_name == "dispatch_attention_fn":
            yield f"{name.rpartition('.')[2]}.{thing_name}", thing
        elif isinstance(thing, type) and thing.__module__ == name:
            for method_name, method in list(vars(thing).items()):
                function = _function_of(method)
                if function is not None:
                    yield f"{thing.__name__}.{method_name}", function


def _function_of(method: Any) -> FunctionType | None:
    if isinstance(method, property):
        method = method.fget
    method = getattr(method, "__func__", method)
    return method if isinstance(method, FunctionType) else None


def _backends() -> Iterator[tuple[str, Any]]:
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    for member, function in getattr(registry, "_backends", {}).items():
        yield f'the backend "{getattr(member, "value", member)}"', function
