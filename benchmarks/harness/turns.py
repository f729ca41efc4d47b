"""Calls in turn, and what becomes of them: a machine that others use as well changes its speed from second to second.

turn:  baseline  ours  baseline  flex  fallback     a share is of the two baselines of its turn, and the median of turns counts
"""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median, quantiles
from typing import Any

import psutil

from compiled_dilated import measure

from .cases import Case
from .problems import WAYS, Call, computed_pairs

PASSES = ("forward", "forward + backward")
# A rival that takes longer to compile is left out; one whose call takes longer is called once.
_MOST_COMPILING_SECONDS, _SLOW_SECONDS = 180.0, 20.0
_MOST_REPEATS = 50
_BUSY = "while True: pass"

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """turns: at most; none starts after `seconds`, but the first `least`. block_seconds: short calls are repeated up to it."""

    turns: int = 9
    least: int = 3
    seconds: float = 10.0
    rival_turns: int = 3
    block_seconds: float = 0.1


@dataclass(frozen=True, eq=False)
class _Block:
    """A call repeated, so that its time is long enough to be measured."""

    call: Call
    repeats: int

    @staticmethod
    def of(call: Call, least_seconds: float) -> _Block:
        """After one call, which is its warm-up."""
        call()
        seconds = measure.timed(call)
        return _Block(
            call, min(_MOST_REPEATS, max(1, math.ceil(least_seconds / max(seconds, 1e-6))))
        )

    def seconds(self) -> float:
        """Time one call, in seconds, after one that is not counted.

        What others did in between took the caches, and a virtual machine's host takes back memory that is free for a second: the
        first call after it paid for both, up to half of its time.
        """
        self.call()

        def run() -> None:
            for _ in range(self.repeats):
                self.call()

        return measure.timed(run) / self.repeats


def rate(case: Case, backward: bool, settings: Settings, rivals: tuple[str, ...]) -> Row:
    """The useful rate of ours and of its rivals, as shares of the baseline's."""
    row = _head(case, backward)
    if lacking := case.problem.lacks_memory(backward):
        return row | {"skipped": lacking}
    # FlexAttention has no backward on a CPU.
    made = {
        name: _rival(case, name, backward) for name in rivals if not (backward and name == "flex")
    }
    others = {name: rival for name, rival in made.items() if isinstance(rival, _Rival)}
    ours, baseline = _blocks(case, backward, settings.block_seconds)
    times: dict[str, list[float]] = {name: [] for name in ("baseline", "ours", *others)}
    started = time.perf_counter()
    for turn in range(settings.turns):
        late = time.perf_counter() - started > settings.seconds
        if late and turn >= settings.least:
            break
        before = baseline.seconds()
        times["ours"].append(ours.seconds())
        times["baseline"].append((before + baseline.seconds()) / 2)
        for name, rival in others.items():
            if turn < settings.rival_turns and not (late and turn) and not (rival.is_slow and turn):
                times[name].append(
                    rival.first_seconds if rival.is_slow else _Block(rival.call, 1).seconds()
                )
    shares = {
        name: _shares(case, seconds, times["baseline"])
        for name, seconds in times.items()
        if name != "baseline"
    }
    computed = computed_pairs(case.problem)
    share = median(shares["ours"])
    bar = case.bars[backward]
    return row | {
        "seconds": times["ours"],
        "baseline_seconds": times["baseline"],
        "useful_gflops": case.problem.flops(backward) / median(times["ours"]) / 1e9,
        "useful_of_computed": None if computed is None else case.problem.pairs / max(computed, 1),
        "share": share,
        "spread": spread(shares["ours"]),
        "bar": bar,
        "met": None if bar is None else share >= bar,
        "rivals": {
            **{
                name: {"refused": reason}
                for name, reason in made.items()
                if isinstance(reason, str)
            },
            **{
                name: {
                    "seconds": times[name],
                    "share": median(shares[name]),
                    "spread": spread(shares[name]),
                }
                for name in others
            },
        },
    }


def _head(case: Case, backward: bool) -> Row:
    problem = case.problem
    return {
        "case": case.name,
        "pass": PASSES[backward],
        "dtype": problem.dtype,
        "tokens": problem.tokens,
        "heads": problem.heads,
        "kv_heads": problem.kv_heads or problem.heads,
        "family": case.family,
        "of": case.baseline.name,
    }


def _blocks(case: Case, backward: bool, least_seconds: float) -> tuple[_Block, _Block]:
    """Ours and its baseline, which takes an eighth of our time at least, twice a turn."""
    ours = _Block.of(case.problem.call(WAYS["ours"](case.problem), backward), least_seconds)
    against = case.baseline
    call = against.problem.call(WAYS[against.way](against.problem), backward)
    return ours, _Block.of(call, max(least_seconds, measure.timed(ours.call) / 8))


@dataclass(frozen=True, eq=False)
class _Rival:
    """Another way, after its first call."""

    call: Call
    first_seconds: float
    is_slow: bool


def _rival(case: Case, name: str, backward: bool) -> _Rival | str:
    """A rival after its first call; or why it takes no part."""
    started = time.perf_counter()
    try:
        with _stopped_after(_MOST_COMPILING_SECONDS):
            call = case.problem.call(WAYS[name](case.problem), backward)
            first = measure.timed(call)
    except Exception as error:  # what another library refuses is a finding, no failure of ours
        # The compiler wraps the timer's exception in its own.
        if time.perf_counter() - started > _MOST_COMPILING_SECONDS:
            return f"stopped after {_MOST_COMPILING_SECONDS:.0f} s of compilation"
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    return _Rival(call, first, name != "flex" and first > _SLOW_SECONDS)


@contextlib.contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after a time, once Python runs again."""

    def stop(signal_number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _shares(case: Case, seconds: list[float], baseline_seconds: list[float]) -> list[float]:
    """Useful rates as shares of the baseline's, turn by turn."""
    work = case.problem.pairs / case.baseline.problem.pairs
    return [work * theirs / mine for mine, theirs in zip(seconds, baseline_seconds, strict=False)]


def spread(values: list[float]) -> tuple[float, float]:
    """The quartiles; of few values the ends."""
    if len(values) < 4:
        return min(values), max(values)
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def family_rows(rows: list[Row], bars: Mapping[str, float]) -> list[Row]:
    """How the time per token and head changes with the length, for each family and pass: its worst length against its first.

    Judged is time per token, as a share of the first's rate. The useful rate is shown too: on a grid, and under a window, tokens
    near an end see fewer keys, so that more tokens mean more pairs a token.
    """
    out = []
    for family in dict.fromkeys(row["family"] for row in rows if row["family"]):
        for which in PASSES:
            members = [
                row
                for row in rows
                if row["family"] == family and row["pass"] == which and "share" in row
            ]
            if len(members) < 2:
                continue
            tokens = [
                row["tokens"]
                * row["heads"]
                / median(row["seconds"])
                * median(row["baseline_seconds"])
                for row in members
            ]
            ratios = {label: [each / values[0] for each in values] for label, values in (
                ("tokens a second", tokens), ("useful rate", [row["share"] for row in members]),
            )}  # fmt: skip
            lengths = f"{members[0]['tokens']} to {members[-1]['tokens']}"
            for label, each in ratios.items():
                bar = (
                    bars.get(family) if label == "tokens a second" and which == "forward" else None
                )
                out.append(
                    {
                        "case": f"{family}, {lengths}: {label}",
                        "pass": which,
                        "dtype": members[0]["dtype"],
                        "of": f"its own at {members[0]['tokens']}",
                        "share": min(each),
                        "of_each": {
                            str(row["tokens"]): ratio
                            for row, ratio in zip(members, each, strict=True)
                        },
                        "bar": bar,
                        "met": None if bar is None else min(each) >= bar,
                    }
                )
    return out


def slow_down(case: Case, backward: bool, settings: Settings) -> Row:
    """How much slower ours and the baseline are beside one busy process, quiet turns and busy ones by turns."""
    # A share of ours says nothing here.
    case = case if case.baseline.way == "SDPA" else replace(case, of=None)
    ours, baseline = _blocks(case, backward, settings.block_seconds)
    functions: dict[str, Callable[[], float]] = {"ours": ours.seconds, "baseline": baseline.seconds}
    quiet: dict[str, list[float]] = {name: [] for name in functions}
    busy: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    with busy_process() as process:
        for turn in range(settings.turns):
            if turn >= settings.least and time.perf_counter() - started > settings.seconds:
                break
            for times, change in ((quiet, process.suspend), (busy, process.resume)):
                change()
                for name, function in functions.items():
                    times[name].append(function())
    slower = {
        name: [loaded / calm for loaded, calm in zip(busy[name], quiet[name], strict=True)]
        for name in functions
    }
    share = median(slower["baseline"]) / median(slower["ours"])
    return _head(case, backward) | {
        "quiet_seconds": quiet,
        "busy_seconds": busy,
        "slower": {
            name: {"median": median(values), "spread": spread(values)}
            for name, values in slower.items()
        },
        "share": share,
        "bar": 1.0,
        "met": share >= 1.0,
    }


@contextlib.contextmanager
def busy_process() -> Iterator[psutil.Process]:
    """One Python process that computes without end, suspended at first."""
    with subprocess.Popen([sys.executable, "-c", _BUSY]) as started:
        process = psutil.Process(started.pid)
        try:
            process.suspend()
            yield process
        finally:
            started.kill()


def as_record(settings: Settings) -> Row:
    """The settings for a JSON file."""
    return asdict(settings)
