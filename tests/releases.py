"""Skip tests on diffusers releases that lack what the tests need."""

from __future__ import annotations

import diffusers
import pytest
from packaging.version import Version

QWENIMAGE_MASKS = ("0.37", "keeps Qwen-Image's mask from attention")
"""The first release whose Qwen-Image blocks mask padded text, and what older releases do."""


def has(release: str) -> bool:
    """Whether the installed diffusers is at least this release."""
    return Version(diffusers.__version__) >= Version(release)


def needs(release: str, otherwise: str) -> None:
    """Skip the test, or all that need the fixture, on older releases, which do `otherwise`."""
    __tracebackhide__ = True  # report the skip at the test, not here
    if not has(release):  # an older release has nothing to test; CI also runs newer ones
        pytest.skip(f"diffusers {diffusers.__version__} {otherwise}")
