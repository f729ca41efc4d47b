"""Memory budgets: bytes, or text as "6GiB"."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction

from ..arguments import MOST, shown

_UNITS = {"B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS[f"{_prefix}iB"] = 1024**_power
    _UNITS[f"{_prefix}B"] = 1000**_power
_FORMAT = re.compile(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})\s*", re.ASCII)


def parse(name: str, budget: int | str) -> int:
    """A budget in bytes. A KB is 1000 bytes, a KiB 1024.

    parse("memory_budget", "0.5GiB")    536870912, as "512 MiB" and 536870912 are

    name: of the argument, for the message

    Raises TypeError or ValueError for anything else.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | str):
        raise TypeError(
            f"{name} must be an int of bytes or a string as '6GiB'; "
            f"got {type(budget).__name__} {shown(budget)}"
        )
    size = budget if isinstance(budget, int) else _read(name, budget)
    if size < 1:
        raise ValueError(f"{name} must be at least 1 byte; got {shown(budget)}")
    if size > MOST:
        raise ValueError(
            f"{name} must be less than 8,388,608 TiB; got {shown(budget)}. "
            "Write what the machine has, as '6GiB'"
        )
    return size


def _read(name: str, text: str) -> int:
    match = _FORMAT.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{name} must be a number and one of {', '.join(_UNITS)}, as '6GiB' or '512 MB'; "
            f"got {shown(text)}"
        )
    # Exact for any length: a float has 16 digits, and int() refuses more than a few thousand.
    return math.floor(Fraction(Decimal(match[1])) * _UNITS[match[2]])
