"""Programs that a recommendation considers."""

from __future__ import annotations

from dataclasses import dataclass

from ..programs import Program
from ..text import read_program

# Tokens on each side of a window.
_WINDOW = 256
# LongNet's first segment, and the growth of segments and rates from branch to branch: each
# branch sees as many keys as the one before, over a longer range.
_SEGMENT, _GROWTH = 2048, 4


@dataclass(frozen=True)
class Candidate:
    """A program, as text and as a value.

    name: "dense", "longnet", "window" or "pattern".
    text: the program as code.
    sees: the keys of a token, in words.
    """

    name: str
    text: str
    program: Program
    sees: str


def candidates(tokens: int, causal: bool) -> list[Candidate]:
    """Dense attention, LongNet and a window, in the order of what a token sees."""
    lengths = _segments(tokens)
    rates = tuple(length // _SEGMENT for length in lengths)
    segments = f"its segment of {_SEGMENT:,} tokens"
    if len(lengths) > 1:
        segments += f", and of longer ones every {_GROWTH}th and fewer"
    if causal:
        return [
            _candidate("dense", "causal()", "every token before it"),
            _candidate("longnet", f"longnet({lengths}, {rates}, causal=True)", segments),
            _candidate("window", f"causal() & window({_WINDOW})", f"{_WINDOW} tokens before it"),
        ]
    return [
        _candidate("dense", "full()", "every token"),
        _candidate("longnet", f"longnet({lengths}, {rates})", segments),
        _candidate("window", f"window({_WINDOW})", f"{_WINDOW} tokens on each side"),
    ]


def _segments(tokens: int) -> tuple[int, ...]:
    """Segment lengths up to the first that has all tokens."""
    lengths = [_SEGMENT]
    while lengths[-1] < tokens:
        lengths.append(lengths[-1] * _GROWTH)
    return tuple(lengths)


def _candidate(name: str, text: str, sees: str) -> Candidate:
    return Candidate(name, text, read_program(text), sees)
