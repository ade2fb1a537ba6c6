"""The file README.md: read as it is, checked as a model card, and replaced in one step."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from diffusers_fa3.errors import InputError

BOM = "\ufeff"


def read_readme(file: Path) -> str | None:
    """The text, its line ends included; None if there is no such file.

    Raises:
        InputError: it is a link, a folder, or no UTF-8.
    """
    if file.is_symlink():
        raise InputError(
            f"the card is a file of its own; {file} is a link to {os.readlink(file)}. Work on a "
            "copy, as hf download NAME --local-dir DIR makes one"
        )
    try:
        return file.read_bytes().decode()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(
            f"the card is a file that can be read; got {file}: {error.strerror}. Give a folder "
            "of your own"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"the card is UTF-8; got {file}: {error}. Save it as UTF-8") from error


def new_readme(name: str) -> str:
    """The card of a folder that has none: the least metadata, and the folder's name."""
    from huggingface_hub import ModelCard, ModelCardData

    card = ModelCard(f"---\n{ModelCardData(library_name='diffusers').to_yaml()}\n---\n")
    return f"{card}\n# {name}\n"


def metadata_of(text: str, file: Path) -> dict[str, Any]:
    """The metadata of a card's text; empty if it has none.

    Raises:
        InputError: they are no YAML, or not what a model card has.
    """
    found: dict[str, Any] = _card(text, file).data.to_dict()
    return found


def replace_readme(file: Path, text: str, metadata: dict[str, Any]) -> None:
    """Put the text in the place of the file, which keeps its mode, once it reads as a card.

    Raises:
        InputError: the text is no card with this metadata, or the folder cannot be written.
    """
    new = file.with_name(f".README.md.{secrets.token_hex(6)}")
    try:
        try:
            mode = stat.S_IMODE(file.stat().st_mode) if file.exists() else None
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as written:
                written.write(text.encode())
                written.flush()
                os.fsync(written.fileno())
            if mode is not None:
                new.chmod(mode)
            if metadata_of(new.read_bytes().decode(), file) != metadata:
                raise InputError(
                    f"a new section leaves the metadata as they are; in {file} the marks stand "
                    "among them. Delete the marks; the file is as it was"
                )
            os.replace(new, file)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"the card is written into its folder; cannot write {file}: {error.strerror}. Give "
            "a folder of your own"
        ) from error


def _card(text: str, file: Path) -> Any:
    from huggingface_hub import ModelCard

    try:
        with _without_advice():
            return ModelCard(text.removeprefix(BOM))
    except Exception as error:  # of YAML, or of one of the fields that the hub knows
        raise InputError(
            f"the metadata at the top of a model card are YAML that the hub knows; got {file}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}. Mend them; the file is as it "
            "was"
        ) from error


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """A card may have no metadata: huggingface_hub warns of that."""
    logging: Any = import_module("huggingface_hub.utils.logging")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
