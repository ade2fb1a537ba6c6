"""`diffusers-fa3 card`: one section of a model's README.md, with what is known and was measured.

Reading order: `card` puts the parts together. `parity` and `speed` read the reports of the commands
`check` and `bench`, by `fields`; `of_model` refuses those of another model. `section` writes the
words, `markdown` escapes them. `marks` finds the section, `readme` reads and replaces the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers_fa3.lazy import lazily

if TYPE_CHECKING:
    from diffusers_fa3.tools.card.card import Written, write_card

__all__ = ["Written", "write_card"]

__getattr__ = lazily(__name__, dict.fromkeys(__all__, "card"))  # with diffusers
