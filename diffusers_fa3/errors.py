"""What can go wrong, by whose fault: the mask's, the arguments', the kernel's or the model's."""

from __future__ import annotations


class FA3Error(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(FA3Error, ValueError):
    """q, k, v, `out` or an option that no kernel could serve: shapes, dtypes, devices, aliasing."""


class MaskError(InputError):
    """A mask that cannot belong to this call, or that the asked-for kernel cannot express."""


class KernelUnavailableError(FA3Error, RuntimeError):
    """No kernel, or not the one that was asked for, can serve; the text has every reason.

    Attributes:
        summary: the same in one line, as it is counted in a coverage report.
    """

    def __init__(self, message: str, summary: str = "") -> None:
        super().__init__(message)
        self.summary = summary or message


class ParallelError(FA3Error, RuntimeError):
    """A call under context parallelism that could not be exact; raised on all ranks alike."""


class UnsupportedModelError(FA3Error, TypeError):
    """An object in which there is no attention layer to switch, or a processor that cannot be."""


class UnsupportedVersionError(FA3Error, ImportError):
    """The installed diffusers lacks what is needed; the text says what, and who has it."""


class FallbackWarning(UserWarning):
    """The default attention served a call instead of the kernel; the text says which and why."""
