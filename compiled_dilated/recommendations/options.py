"""The table of candidates and ways, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass

from ..plans.printing import three_digits
from ..text import read_program
from .candidates import Candidate, candidates
from .ways import Request, Way, weigh

# Preferred in this order: a ring needs more devices, a stream only files.
_KINDS = ("call", "stream", "ring")


@dataclass(frozen=True)
class Option:
    """A candidate run in a way.

    fits: whether its peak is within the limit of memory.
    is_fast: whether it is within the limit of time; True where no rate is known.
    pairs: computed pairs as a share of those that full attention computes.
    longest: tokens of the longest sequence that fits in one call.
    """

    candidate: Candidate
    way: Way
    fits: bool
    is_fast: bool
    pairs: float
    longest: int


@dataclass(frozen=True)
class Recommendation:
    """Options for a request, and the recommended one; None if nothing fits."""

    request: Request
    options: tuple[Option, ...]
    best: Option | None
    reason: str


def recommend(request: Request, pattern: str | None = None, causal: bool = False) -> Recommendation:
    """Recommend a program and a way to run it, for a request.

    pattern: a program as text, which is recommended if it fits; None for the choice of one.
    causal: a token sees only itself and earlier ones; for the choice of a program.

    Raises ValueError for a pattern that is no program, or not one of so many tokens.
    """
    programs = candidates(request.tokens, causal)
    if pattern is not None:
        own = Candidate("pattern", pattern, read_program(pattern), "what the pattern allows")
        programs = [own, programs[0]]
    options: list[Option] = []
    for candidate in programs:
        options += _options(candidate, request)
    # Dense attention beside a pattern is there for comparison.
    eligible = [option for option in options if pattern is None or option.candidate is programs[0]]
    best = _best([option for option in eligible if option.fits])
    if best is None:
        return Recommendation(request, tuple(options), None, _remedy(request, eligible))
    return Recommendation(request, tuple(options), best, _reason(request, options, best))


def _options(candidate: Candidate, request: Request) -> list[Option]:
    """A candidate in all ways worth a look."""
    weighed = weigh(candidate.program, request)
    options = []
    for way in weighed.ways:
        fits = way.peak_bytes <= request.limit
        is_fast = way.seconds is None or way.seconds <= request.seconds
        options.append(Option(candidate, way, fits, is_fast, weighed.pairs, weighed.longest))
    return options


def _best(options: list[Option]) -> Option | None:
    """The first fast option of the simplest kind, else its fastest."""
    for kind in _KINDS:
        of_kind = [option for option in options if option.way.kind == kind]
        fast = [option for option in of_kind if option.is_fast]
        if fast:
            return fast[0]
        if of_kind:
            return min(of_kind, key=lambda option: option.way.seconds or 0.0)
    return None


def _remedy(request: Request, eligible: list[Option]) -> str:
    """The changes that would let one of the options fit."""
    remedies = ["raise --memory"]
    if request.batch > 1:
        remedies.append("lower --batch")
    tokens = max(option.longest for option in eligible)
    if tokens:
        remedies.append(f"shorten the sequence to at most {tokens:,} tokens")
    return f"nothing fits: {', or '.join(remedies)}"


def _reason(request: Request, options: list[Option], best: Option) -> str:
    """Why an option is recommended, from what its plan predicts."""
    dense = next(option for option in options if option.candidate.name == "dense")
    sentences = []
    if best.candidate.name == "dense":
        end = "no other program is faster"
        if best.is_fast:
            end = "no pattern is needed"
        sentences.append(f"dense attention fits{_time(best, request)}: {end}")
    else:
        sentences.append(f"dense attention {_shortfall(dense, request)}")
        sentences.append(
            f"{best.candidate.name} computes {best.pairs:.2%} of all pairs{_time(best, request)}; "
            f"a token sees {best.candidate.sees}"
        )
    if best.way.kind != "call":
        # The first way of a candidate is one call.
        call = next(option for option in options if option.candidate is best.candidate)
        reason = _KIND_REASONS[best.way.kind]
        sentences.append(f"one call would take {gib(call.way.peak_bytes)}: {reason}")
    if best.way.seconds is None:
        sentences.append(
            f"no rate was measured for {request.dtype} on {request.device}: "
            "give --tflops to weigh times"
        )
    return "; ".join(sentences)


_KIND_REASONS = {
    "stream": "files take its place, and one device is enough",
    "ring": "each device has a part of the sequence",
}


def _time(option: Option, request: Request) -> str:
    """The time of an option and the limit, as a clause."""
    time = option.way.seconds
    if time is None:
        return ""
    side = "within" if option.is_fast else "more than"
    return f" and takes about {in_seconds(time)}, {side} {in_seconds(request.seconds)}"


def _shortfall(dense: Option, request: Request) -> str:
    """What dense attention lacks."""
    if not dense.fits:
        return f"takes {gib(dense.way.peak_bytes)} in one call, more than {gib(request.limit)}"
    if dense.way.seconds is None:
        return "fits too"
    return f"fits{_time(dense, request)}"


def gib(size: int) -> str:
    """Bytes in GiB, with three digits."""
    return f"{three_digits(size / 2**30)} GiB"


def in_seconds(time: float) -> str:
    """Seconds, or milliseconds below one, with three digits."""
    if time < 1:
        return f"{three_digits(time * 1e3)} ms"
    return f"{three_digits(time)} s"
