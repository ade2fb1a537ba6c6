"""Properties: what holds of every call, tried on random ones.

How many is said by a profile, see tests/conftest.py: `--hypothesis-profile=nightly` tries far more.
"""

from hypothesis import settings


def tried(times: float) -> settings:
    """As many examples as the profile says, times so much."""
    return settings(max_examples=round(times * settings().max_examples))
