"""Bytes as people write them."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction

from ..arguments import MOST, shown

_UNITS = {"B": 1} | {
    prefix + ending: base**power for power, prefix in enumerate("KMGT", start=1) for ending, base in (("iB", 1024), ("B", 1000))
}
_WRITTEN = re.compile(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})\s*", re.ASCII)


def parse(name: str, budget: int | str) -> int:
    """The bytes that the argument `name` asks for.

    parse("memory_budget", "0.5GiB")    536870912, as also of "512 MiB" and of 536870912; a KB is 1000, a KiB 1024

    Raises TypeError or ValueError with the name, what came and what would do.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | str):
        raise TypeError(f"{name} must be an int of bytes or a string as '6GiB'; got {type(budget).__name__} {shown(budget)}")
    size = budget if isinstance(budget, int) else _read(name, budget)
    if size < 1:
        raise ValueError(f"{name} must be at least 1 byte; got {shown(budget)}")
    if size > MOST:
        raise ValueError(f"{name} must be less than 8,388,608 TiB; got {shown(budget)}. Write what the machine has, as '6GiB'")
    return size


def _read(name: str, written: str) -> int:
    found = _WRITTEN.fullmatch(written)
    if found is None:
        raise ValueError(f"{name} must be a number and one of {', '.join(_UNITS)}, as '6GiB' or '512 MB'; got {shown(written)}")
    # Exact, and of any length: a float has 16 digits, and int() refuses more than a few thousand.
    return math.floor(Fraction(Decimal(found[1])) * int(_UNITS[found[2]]))
