"""A kernel that raises on one rank must not leave the other ranks waiting."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from diffusers_fa3.attention import Declined, Served, attend
from diffusers_fa3.errors import InputError, KernelUnavailableError
from diffusers_fa3.layers import Frame
from diffusers_fa3.parallel import attend_split


@contextmanager
def errors_of_kernels() -> Iterator[list[str]]:
    """Have the default serve where a kernel raises or refuses; yields the errors as they come.

    So this rank takes part in all that follows in the call. Only for processes that do nothing
    else, since every attention call of the process is looked after.
    """
    errors: list[str] = []

    def instead(error: Exception) -> Declined:
        errors.append(f"{type(error).__name__}: {error}")
        words = f"the kernel did not serve on this rank: {getattr(error, 'summary', error)}"
        return Declined(words, InputError(words))

    @functools.wraps(attend)
    def looked_after(*args: Any, **kwargs: Any) -> Served | Declined:
        try:
            answer = attend(*args, **kwargs)
        except InputError:
            raise
        except Exception as error:  # a kernel may raise any; the check tells
            return instead(error)
        if isinstance(answer, Declined) and isinstance(answer.error, KernelUnavailableError):
            return answer if kwargs["kernel"] == "auto" else instead(answer.error)
        return answer

    with ExitStack() as patched:
        for caller in (attend_split, Frame):
            module = sys.modules[caller.__module__]
            patched.enter_context(mock.patch.object(module, "attend", looked_after))
        yield errors
