"""A recommendation as text, and as plain values."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from .. import masks, orders
from .options import Option, Recommendation, gib, in_seconds

_ANSWERS = {True: "yes", False: "no"}


def as_text(recommendation: Recommendation) -> str:
    """The request, the options, the choice and its reason, as text."""
    best = recommendation.best
    lines = [_request_line(recommendation), "", _table(recommendation), ""]
    candidates = dict.fromkeys(option.candidate for option in recommendation.options)
    lines += [f"{candidate.name:<12} {candidate.text}" for candidate in candidates]
    lines += [
        "",
        "longest: tokens of the longest sequence that fits in one call. time: by the rates of the",
        "device, without the time of files and messages. ring, parts: memory of one device.",
        "",
    ]
    # Without a choice the reason names the change to make.
    if best is None:
        return "\n".join([*lines, *_clauses("recommended", recommendation.reason)])
    lines += [
        f"recommended  {best.candidate.name}, {best.way}",
        *_clauses("because", recommendation.reason),
        f"in Python    program = {_in_python(best.candidate.text)}",
        f"             {best.way.code}",
    ]
    return "\n".join(lines)


def to_json(recommendation: Recommendation) -> dict[str, Any]:
    """The same as plain values."""
    best = recommendation.best
    return {
        "request": asdict(recommendation.request),
        "options": [_row(option) for option in recommendation.options],
        "recommended": None if best is None else _row(best),
        "reason": recommendation.reason,
    }


def _request_line(recommendation: Recommendation) -> str:
    """The request in words."""
    request = recommendation.request
    keys, passes = "", "forward"
    if request.kv_heads:
        keys = f", {request.kv_heads} key heads"
    if request.training:
        passes = "forward and backward"
    return (
        f"{request.tokens:,} tokens, batch {request.batch}, {request.heads} heads of "
        f"{request.head_dim}{keys}, {request.dtype} on {request.device}, {passes}: "
        f"within {gib(request.limit)} and {in_seconds(request.seconds)}"
    )


def _table(recommendation: Recommendation) -> str:
    """One row per option; the recommended one has a star."""
    cells = []
    for option in recommendation.options:
        star = "*" if option is recommendation.best else ""
        cells.append([star, *_cells(option)])
    headers = ["", "program", "way", "pairs", "memory", "fits", "time", "in time", "longest"]
    alignment = ("left", "left", "left", "right", "right", "left", "right", "left", "right")
    table: str = tabulate(cells, headers=headers, disable_numparse=True, colalign=alignment)
    return table


def _cells(option: Option) -> list[str]:
    """An option as a row of the table."""
    time, in_time = "unknown", ""
    if option.way.seconds is not None:
        time, in_time = in_seconds(option.way.seconds), _ANSWERS[option.is_fast]
    return [
        option.candidate.name,
        str(option.way),
        f"{option.pairs:.2%}",
        gib(option.way.peak_bytes),
        _ANSWERS[option.fits],
        time,
        in_time,
        f"{option.longest:,}",
    ]


def _clauses(name: str, reason: str) -> list[str]:
    """A reason as lines, one for each clause."""
    first, *following = reason.split("; ")
    return [f"{name:<12} {first}", *[f"{'':<12} {clause}" for clause in following]]


def _in_python(text: str) -> str:
    """A program as code that imports the package as cd."""

    def qualified(match: re.Match[str]) -> str:
        # Masks and orders are in modules of their own, programs in the package.
        name = match[1]
        if name in masks.__all__:
            return f"cd.masks.{name}("
        if hasattr(orders, name):
            return f"cd.orders.{name}("
        return f"cd.{name}("

    return re.sub(r"\b([A-Za-z_]+)\(", qualified, text)


def _row(option: Option) -> dict[str, Any]:
    """An option as plain values."""
    in_time = None
    if option.way.seconds is not None:
        in_time = option.is_fast
    return {
        "program": option.candidate.name,
        "pattern": option.candidate.text,
        "way": option.way.kind,
        "ranks": option.way.ranks,
        "peak_bytes": option.way.peak_bytes,
        "fits": option.fits,
        "seconds": option.way.seconds,
        "in_time": in_time,
        "pairs_share": option.pairs,
        "longest_tokens": option.longest,
        "code": option.way.code,
    }
