"""Find what the names in a function's code lead to, and copy the code with some names replaced.

Bytecode loads a global, or an attribute of a module, through an entry of `co_names`. All
instructions that use the name share this entry, so a copy with another entry loads another object.
The copy is not compiled again, runs as fast, and is otherwise the same.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

from diffusers_fa3.errors import UnsupportedModelError

_FLAG_BITS = {
    "LOAD_GLOBAL": int(sys.version_info >= (3, 11)),
    "LOAD_ATTR": int(sys.version_info >= (3, 12)),
    "LOAD_METHOD": 0,
}
"""Opcode that loads a value by name -> the number of low argument bits that are flags."""


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """One instruction that loads a global, or an attribute of a module loaded just before."""

    offset: int
    name: str
    namespace: dict[str, Any]
    """The globals in which the name is looked up: the function's, or the module's."""
    value: Any
    """The object that the name leads to now; None if there is no such name."""


def loads(code: CodeType, namespace: dict[str, Any]) -> Iterator[Load]:
    """The loads in a function's own code, in order, without those of functions defined in it."""
    value: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "EXTENDED_ARG":
            continue
        place = None
        if instruction.opname == "LOAD_GLOBAL":
            place = namespace
        elif instruction.opname in _FLAG_BITS and isinstance(value, ModuleType):
            place = vars(value)
        value = None if place is None else place.get(instruction.argval)
        if place is not None:
            yield Load(instruction.offset, instruction.argval, place, value)


def renamed(
    code: CodeType, namespace: dict[str, Any], new_name: Callable[[Load], str | None]
) -> CodeType:
    """A copy of the code, and of the functions defined in it, with some loads renamed.

    Args:
        code: the code of a function.
        namespace: the function's globals.
        new_name: returns the new name of a load, or None to keep the name.

    Raises:
        UnsupportedModelError: only some of the loads that share a name are to be renamed, and the
            instructions have no room for the index of a new name.
    """
    names, bytecode = list(code.co_names), bytearray(code.co_code)
    changed = {
        load.offset: new for load in loads(code, namespace) if (new := new_name(load)) is not None
    }
    for old in dict.fromkeys(code.co_names):
        users = [i for i in dis.get_instructions(code) if _uses_name(i) and i.argval == old]
        asked = [i for i in users if i.offset in changed]
        if asked and len(asked) == len(users):
            names[names.index(old)] = changed[asked[0].offset]
        elif asked:
            names.append(changed[asked[0].offset])
            for instruction in asked:
                _point_at(bytecode, instruction, len(names) - 1, code)
    constants = tuple(
        renamed(constant, namespace, new_name) if isinstance(constant, CodeType) else constant
        for constant in code.co_consts
    )
    return code.replace(co_names=tuple(names), co_code=bytes(bytecode), co_consts=constants)


def _uses_name(instruction: dis.Instruction) -> bool:
    return instruction.opcode in dis.hasname


def _point_at(
    bytecode: bytearray, instruction: dis.Instruction, index: int, code: CodeType
) -> None:
    """Make an instruction use another entry of `co_names`."""
    assert instruction.arg is not None
    bits = _FLAG_BITS[instruction.opname]
    low, high = index << bits | instruction.arg & (1 << bits) - 1, instruction.arg >> 8
    if low > 0xFFFF or (low > 0xFF and not high):
        raise UnsupportedModelError(
            f"{code.co_name} cannot be switched: it has {len(code.co_names)} names, and uses "
            f"{instruction.argval!r} for attention and for something else. Give one of the two "
            "another name"
        )
    bytecode[instruction.offset + 1] = low & 0xFF
    if high:
        bytecode[instruction.offset - 1] = low >> 8
