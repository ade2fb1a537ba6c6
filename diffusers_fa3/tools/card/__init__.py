"""`diffusers-fa3 card`: one section of a model's README.md, with what is known and was measured.

Reading order: `card` puts the parts together. `parity` and `speed` read the reports of the commands
`check` and `bench`, by `fields`; `of_model` refuses those of another model. `section` writes the
words, `markdown` escapes them. `marks` finds the section, `readme` reads and replaces the file.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_fa3.tools.card.card import Written, write_card

__all__ = ["Written", "write_card"]


def __getattr__(name: str) -> Any:
    """Import a public name, and diffusers with it, when it is first used."""
    if name in __all__:
        return getattr(import_module("diffusers_fa3.tools.card.card"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
