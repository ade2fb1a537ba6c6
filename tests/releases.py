"""What a release of diffusers lacks that the newest one has, and tests that therefore skip it."""

from __future__ import annotations

import diffusers
import pytest
from packaging.version import Version

QWENIMAGE_MASKS = ("0.37", "keeps Qwen-Image's mask from attention")
"""The release from which on its blocks mask padded text, and what those before do instead."""


def has(release: str) -> bool:
    """Whether the installed diffusers is as new as that."""
    return Version(diffusers.__version__) >= Version(release)


def needs(release: str, otherwise: str) -> None:
    """Skip the test, or all that need the fixture, on an older diffusers: it does `otherwise`."""
    __tracebackhide__ = True  # the test is what is skipped, not this line
    if not has(release):  # there is nothing to be tested; newer releases run it, in CI too
        pytest.skip(f"diffusers {diffusers.__version__} {otherwise}")
