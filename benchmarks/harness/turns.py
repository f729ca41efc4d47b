"""Calls in turn: a change of the machine's speed affects them alike.

turn:  baseline  ours  baseline  flex  fallback

A share is of the mean of the two baselines of its turn; the median of turns is reported.
"""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
    """Numbers and times of turns.

    turns: the most turns.
    least: the least turns.
    seconds: time after which no further turn starts.
    rival_turns: the most turns of rivals.
    block_seconds: time up to which a short call is repeated.
    """

    turns: int = 9
    least: int = 3
    seconds: float = 10.0
    rival_turns: int = 3
    block_seconds: float = 0.1


@dataclass(frozen=True, eq=False)
class _Block:
    """A call, repeated so that its time can be measured."""

    call: Call
    repeats: int

    @staticmethod
    def of(call: Call, least_seconds: float) -> _Block:
        """The block of a call, which is called twice: warm-up, and measurement."""
        call()
        seconds = measure.timed(call)
        repeats = math.ceil(least_seconds / max(seconds, 1e-6))
        return _Block(call, min(_MOST_REPEATS, max(1, repeats)))

    def seconds(self) -> float:
        """Seconds of one call, measured after a call that does not count.

        Other functions evict the caches, and a virtual machine's host reclaims memory that is free
        for a second: the first call afterwards is slower, up to half of its time.
        """
        self.call()

        def run() -> None:
            for _ in range(self.repeats):
                self.call()

        return measure.timed(run) / self.repeats


def rate(case: Case, backward: bool, settings: Settings, rivals: tuple[str, ...]) -> Row:
    """Measure useful rates of ours and rivals as shares of the baseline's."""
    row = _head(case, backward)
    reason = case.problem.lacks_memory(backward)
    if reason:
        return row | {"skipped": reason}
    ready = {}
    for name in rivals:
        # FlexAttention has no backward on a CPU.
        if not (backward and name == "flex"):
            ready[name] = _rival(case, name, backward)
    times = _times(case, backward, settings, ready)
    shares = _shares(case, times["ours"], times["baseline"])
    useful: float | None = None
    computed = computed_pairs(case.problem)
    if computed is not None:
        useful = case.problem.pairs / max(computed, 1)
    share, bar = median(shares), case.bars[backward]
    return row | {
        "seconds": times["ours"],
        "baseline_seconds": times["baseline"],
        "useful_gflops": case.problem.flops(backward) / median(times["ours"]) / 1e9,
        "useful_of_computed": useful,
        "share": share,
        "spread": spread(shares),
        "bar": bar,
        "met": _is_met(share, bar),
        "rivals": {name: _rival_row(case, rival, name, times) for name, rival in ready.items()},
    }


def _is_met(share: float, bar: float | None) -> bool | None:
    """Whether a share reaches its bar; None without a bar."""
    return None if bar is None else share >= bar


def _times(
    case: Case, backward: bool, settings: Settings, rivals: Mapping[str, _Rival | str]
) -> dict[str, list[float]]:
    """Seconds of baseline, measured call and rivals, turn by turn.

    rivals: those that refused, as a reason, take no part.
    """
    block, baseline = _blocks(case, backward, settings.block_seconds)
    running = {name: rival for name, rival in rivals.items() if isinstance(rival, _Rival)}
    times: defaultdict[str, list[float]] = defaultdict(list)
    started = time.perf_counter()
    for turn in range(settings.turns):
        is_late = time.perf_counter() - started > settings.seconds
        if is_late and turn >= settings.least:
            break
        before = baseline.seconds()
        times["ours"].append(block.seconds())
        times["baseline"].append((before + baseline.seconds()) / 2)
        for name, rival in running.items():
            # Every rival is measured once: a slow one by its first call, others in more turns.
            if turn and (is_late or rival.is_slow or turn >= settings.rival_turns):
                continue
            times[name].append(rival.seconds())
    return times


def _rival_row(case: Case, rival: _Rival | str, name: str, times: Mapping[str, list[float]]) -> Row:
    """The figures of a rival, or why it refused."""
    if isinstance(rival, str):
        return {"refused": rival}
    shares = _shares(case, times[name], times["baseline"])
    return {"seconds": times[name], "share": median(shares), "spread": spread(shares)}


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
    """The blocks of the measured call and of its baseline.

    The baseline is repeated for at least an eighth of the measured call's time.
    """
    block = _Block.of(case.problem.call(WAYS["ours"](case.problem), backward), least_seconds)
    baseline = case.baseline
    call = baseline.problem.call(WAYS[baseline.way](baseline.problem), backward)
    return block, _Block.of(call, max(least_seconds, measure.timed(block.call) / 8))


@dataclass(frozen=True, eq=False)
class _Rival:
    """Another way to compute the problem, after its first call."""

    call: Call
    first_seconds: float
    is_slow: bool

    def seconds(self) -> float:
        """Seconds of one call; of a slow rival, of its first call."""
        if self.is_slow:
            return self.first_seconds
        return _Block(self.call, 1).seconds()


def _rival(case: Case, name: str, backward: bool) -> _Rival | str:
    """A rival after its first call, or the reason why it refused."""
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
    turns = zip(seconds, baseline_seconds, strict=False)
    return [work * baseline / own for own, baseline in turns]


def spread(values: list[float]) -> tuple[float, float]:
    """The quartiles; of fewer than four values the least and the greatest."""
    if len(values) < 4:
        return min(values), max(values)
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def family_rows(rows: list[Row], bars: Mapping[str, float]) -> list[Row]:
    """Compare the worst length of each family and pass with its first.

    The bar is for time per token and head, as a share of the first's rate. The useful rate is
    reported too: on a grid, and under a window, tokens near an end see fewer keys, so that longer
    sequences have more pairs a token.
    """
    members: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["family"] and "share" in row:
            members[row["family"], row["pass"]].append(row)
    out = []
    for (family, name), of_pass in members.items():
        if len(of_pass) < 2:
            continue
        bar = bars.get(family) if name == "forward" else None
        speeds = [_tokens_rate(row) for row in of_pass]
        out.append(_family_row("tokens a second", of_pass, speeds, bar))
        rates = [row["share"] for row in of_pass]
        out.append(_family_row("useful rate", of_pass, rates, None))
    return out


def _tokens_rate(row: Row) -> float:
    """Tokens and heads per time of the baseline."""
    rate: float = row["tokens"] * row["heads"] / median(row["seconds"])
    return rate * median(row["baseline_seconds"])


def _family_row(figure: str, members: list[Row], values: list[float], bar: float | None) -> Row:
    """The row of a family for one figure.

    figure: its name.
    members: rows of the family and pass, by ascending length.
    values: the figure of each member.
    """
    first, last = members[0], members[-1]
    ratios = [value / values[0] for value in values]
    worst = min(ratios)
    return {
        "case": f"{first['family']}, {first['tokens']} to {last['tokens']}: {figure}",
        "pass": first["pass"],
        "dtype": first["dtype"],
        "of": f"its own at {first['tokens']}",
        "share": worst,
        "of_each": {str(row["tokens"]): x for row, x in zip(members, ratios, strict=True)},
        "bar": bar,
        "met": _is_met(worst, bar),
    }


def slow_down(case: Case, backward: bool, settings: Settings) -> Row:
    """Measure the slow-down of call and baseline beside one busy process.

    Turns with the process suspended and running alternate.
    """
    # A baseline of this library would be slowed down the same: dense SDPA takes its place.
    if case.baseline.way != "SDPA":
        case = replace(case, of=None)
    block, baseline = _blocks(case, backward, settings.block_seconds)
    functions: dict[str, Callable[[], float]] = {
        "ours": block.seconds,
        "baseline": baseline.seconds,
    }
    quiet: defaultdict[str, list[float]] = defaultdict(list)
    busy: defaultdict[str, list[float]] = defaultdict(list)
    started = time.perf_counter()
    with busy_process() as process:
        for turn in range(settings.turns):
            if turn >= settings.least and time.perf_counter() - started > settings.seconds:
                break
            for times, change in ((quiet, process.suspend), (busy, process.resume)):
                change()
                for name, function in functions.items():
                    times[name].append(function())
    ratios: dict[str, list[float]] = {}
    for name in functions:
        turns = zip(busy[name], quiet[name], strict=True)
        ratios[name] = [loaded / calm for loaded, calm in turns]
    share = median(ratios["baseline"]) / median(ratios["ours"])
    slower = {}
    for name, values in ratios.items():
        slower[name] = {"median": median(values), "spread": spread(values)}
    figures = {"quiet_seconds": quiet, "busy_seconds": busy, "slower": slower, "share": share}
    return _head(case, backward) | figures | {"bar": 1.0, "met": share >= 1.0}


@contextlib.contextmanager
def busy_process() -> Iterator[psutil.Process]:
    """One Python process in an endless loop, suspended at first."""
    with subprocess.Popen([sys.executable, "-c", _BUSY]) as started:
        process = psutil.Process(started.pid)
        try:
            process.suspend()
            yield process
        finally:
            started.kill()
