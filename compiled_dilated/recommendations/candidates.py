"""Programs that a recommendation considers."""

from __future__ import annotations

from dataclasses import dataclass

from ..programs import Program
from ..text import read_program

# Tokens on each side of a window.
_WINDOW = 256
# LongNet's first segment, the growth of segments and rates from branch to branch, the largest rate,
# and the longest segment: a branch computes segment / rate**2 pairs for each token, here at most as
# many as the first.
_SEGMENT, _GROWTH, _MOST_RATE, _LONGEST = 2048, 4, 32, 2**21


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
    """Dense attention, LongNet and a window: from most keys to fewest."""
    lengths = _segments(tokens)
    rates = tuple(min(length // _SEGMENT, _MOST_RATE) for length in lengths)
    segments = f"its segment of {_SEGMENT:,} tokens"
    if len(lengths) > 1:
        segments += f", and every {_GROWTH}th to {rates[-1]}th of longer ones up to {lengths[-1]:,}"
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
    """Segment lengths, up to the sequence's or the longest."""
    lengths = [_SEGMENT]
    while lengths[-1] < min(tokens, _LONGEST):
        lengths.append(lengths[-1] * _GROWTH)
    return tuple(lengths)


def _candidate(name: str, text: str, sees: str) -> Candidate:
    return Candidate(name, text, read_program(text), sees)
