"""The names in a function's code: what they lead to, and the same code with other names.

A function finds a global, or an attribute of a module, by a name that its code lists once for all
instructions that use it. A changed list is a changed function: nothing is compiled, nothing runs
slower, and whatever the names do not concern stays as it was.
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
"""Instructions that load a value by a name; how many low bits of their argument are no index."""


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """One instruction that loads a global, or an attribute of a module that was loaded so."""

    offset: int
    name: str
    namespace: dict[str, Any]
    """Where the name is looked up: the function's globals, or the module's."""
    value: Any
    """What it leads to now; None where it leads nowhere."""


def loads(code: CodeType, namespace: dict[str, Any]) -> Iterator[Load]:
    """All such instructions of a function's own code, in order; not of functions defined in it."""
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
    """A code object of its own, functions defined in it included, with some loads by other names.

    Args:
        code: of a function.
        namespace: its globals.
        new_name: the name that a load is to go by; None for the one that it has.

    Raises:
        UnsupportedModelError: the code shares a name between what is renamed and what is not, and
            has more names than an instruction can tell apart in place.
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
    """Have an instruction use another entry of the list of names."""
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
