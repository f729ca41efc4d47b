"""Bytes as people write them."""

from __future__ import annotations

import math
import re

_UNITS = {"B": 1} | {
    prefix + ending: base**power for power, prefix in enumerate("KMGT", start=1) for ending, base in (("iB", 1024), ("B", 1000))
}
_WRITTEN = re.compile(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})\s*")


def parse(name: str, budget: int | str) -> int:
    """The bytes that the argument `name` asks for.

    parse("memory_budget", "0.5GiB")    536870912, as also of "512 MiB" and of 536870912; a KB is 1000, a KiB 1024

    Raises TypeError or ValueError with the name, what came and what would do.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | str):
        raise TypeError(f"{name} must be an int of bytes or a string as '6GiB'; got {budget!r} of type {type(budget).__name__}")
    size = budget if isinstance(budget, int) else _read(name, budget)
    if size < 1:
        raise ValueError(f"{name} must be at least 1 byte; got {budget!r}")
    return size


def _read(name: str, written: str) -> int:
    found = _WRITTEN.fullmatch(written)
    if found is None:
        raise ValueError(f"{name} must be a number and one of {', '.join(_UNITS)}, as '6GiB' or '512 MB'; got {written!r}")
    return math.floor(float(found[1]) * int(_UNITS[found[2]]))
