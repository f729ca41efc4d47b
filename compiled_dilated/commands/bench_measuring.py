"""How `compiled-dilated bench` measures.

Dense calls stand before and after each call that is compared to them, and what is reported is the median of the turns' ratios: a
machine that others use as well changes its speed from second to second.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import measure
from ..compiler import compile
from ..programs import Program
from . import rivals
from .bench_cases import CASES, FLAT, FLAT_WITHIN, QUICK_CASES, SHORT, SHORT_TOKENS, Case, Rival, Setup
from .rivals import Attention

# Above so many seconds (at the rate below) a call is its own warm-up.
_LONG_SECONDS, _SLOW_RATE = 4.0, 60e9
_RIVAL_TURNS = 3
# A call stands between dense calls that take together about one part in so many of its time.
_DENSE_SHARE = 4

Row = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """One thing to measure: the table it belongs to, its name, and how."""

    table: str
    name: str
    run: Callable[[Setup], list[Row]]


def measurements(quick: bool) -> Iterator[Measurement]:
    """Everything that the benchmark holds, in the order of its tables."""
    for case in QUICK_CASES if quick else CASES:
        yield Measurement("rate", case.name, partial(_rate, case, quick))
    sizes = (2**13, 2**14, 2**15) if quick else (2**13, 2**15, 2**17, 2**20)
    for name, program_of in FLAT.items():
        yield Measurement("flat", f"flat-{name}", partial(_flat, f"flat-{name}", program_of, sizes))
    for name, tokens in itertools.product(SHORT, SHORT_TOKENS):
        yield Measurement("short", f"short-{name}-{tokens}", partial(_short, name, tokens))


def _call(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """One forward, and its backward where q requires grad."""
    if not q.requires_grad:
        return lambda: attention(q, k, v)
    grad_out = torch.ones_like(q)
    return lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), grad_out)


def _rate(case: Case, quick: bool, setup: Setup) -> list[Row]:
    """The useful rate of a case as a share of the dense rate, and its time against its rivals'."""
    rows = []
    allowed = case.pairs(setup)
    for backward, required in ((False, case.forward), (True, case.both)):
        row: Row = {"case": case.name, "pass": "forward + backward" if backward else "forward", "tokens": case.tokens}
        rows.append(row)
        if lacking := setup.lacks_memory(case.tokens, backward):
            row["skipped"] = lacking
            continue
        ours = _call(compile(case.program), *setup.tensors(case.tokens, backward))
        flops = setup.flops(allowed, backward)
        warmup = 0 if setup.device == "cpu" and flops / _SLOW_RATE > _LONG_SECONDS else 1
        turns = _beside_dense(setup, ours, flops, backward, warmup, setup.seconds)
        dense_flops = setup.dense_flops(backward)
        share = measure.median([flops / mine / (dense_flops / dense) for mine, dense in turns])
        row |= {
            "seconds": [mine for mine, _ in turns],
            "dense_seconds": [dense for _, dense in turns],
            "useful_flops": flops,
            "useful_gflops": flops / measure.median([mine for mine, _ in turns]) / 1e9,
            "dense_gflops": dense_flops / measure.median([dense for _, dense in turns]) / 1e9,
            "share": share,
            "required_share": required if setup.judged else None,
        }
        row["ok"] = share >= required if setup.judged else None
        _compare(setup, row, ours, _rivals_of(case, quick, backward and setup.device == "cpu"), backward)
    return rows


def _beside_dense(
    setup: Setup, ours: Callable[[], object], flops: float, backward: bool, warmup: int, seconds: float
) -> list[tuple[float, float]]:
    """Seconds of one call of ours, and of one dense call: the mean of those around it."""
    dense_once = _call(rivals.dense(causal=False), *setup.tensors(setup.dense_tokens, backward))
    dense_flops = setup.dense_flops(backward)
    count = max(1, round(flops / dense_flops / _DENSE_SHARE))

    def dense() -> None:
        for _ in range(count):
            dense_once()

    dense_once()
    before = measure.timed(dense)
    times = measure.interleaved({"ours": ours, "dense": dense}, setup.repeats, warmup, seconds)
    around = [(one + other) / 2 / count for one, other in itertools.pairwise([before, *times["dense"]])]
    return list(zip(times["ours"], around, strict=True))


def _rivals_of(case: Case, quick: bool, without_flex: bool) -> tuple[Rival, ...]:
    """What to compare with: FlexAttention has no backward on a CPU, and takes seconds to compile for each mask."""
    if without_flex:
        return ()
    return case.rivals if not quick else case.rivals[-1:] if case.name == "window-16k" else ()


def _compare(setup: Setup, row: Row, ours: Callable[[], object], chosen: Sequence[Rival], backward: bool) -> None:
    """Our time and each rival's, in turn; into the row."""
    row["rivals"] = {}
    for rival in chosen:
        q, k, v = setup.tensors(row["tokens"], backward)
        torch.compiler.reset()  # too many compiled masks of one function, and torch falls back to dense without a word
        theirs = _call(rival.make(setup), q, k, v)
        times = measure.interleaved({"ours": ours, "theirs": theirs}, min(setup.repeats, _RIVAL_TURNS), 1, setup.seconds)
        ratio = measure.median([theirs / mine for theirs, mine in zip(times["theirs"], times["ours"], strict=True)])
        ok = ratio >= rival.least if setup.judged else None
        row["rivals"][rival.name] = {
            "seconds": times["theirs"],
            "our_seconds": times["ours"],
            "ratio": ratio,
            "least": rival.least,
            "ok": ok,
        }


def _flat(name: str, program_of: Callable[[int], Program], sizes: tuple[int, ...], setup: Setup) -> list[Row]:
    """Forward time per token at each length, and the same in dense calls of the same minute, whose spread is judged."""
    row: Row = {"case": name, "microseconds_per_token": {}, "dense_calls_per_million_tokens": {}, "seconds": {}, "skipped": {}}
    for tokens in sizes:
        if lacking := setup.lacks_memory(tokens, False):
            row["skipped"][str(tokens)] = lacking
            continue
        ours = _call(compile(program_of(tokens)), *setup.tensors(tokens, False))
        warmup = int(tokens <= 2**16 or setup.device == "cuda")
        # How many dense calls a call is worth matters little; that of LongNet at this length serves for all.
        turns = _beside_dense(setup, ours, setup.dense_flops(False) * tokens / 2**12, False, warmup, setup.seconds)
        row["seconds"][str(tokens)] = [mine for mine, _ in turns]
        row["microseconds_per_token"][str(tokens)] = measure.median([mine for mine, _ in turns]) / tokens * 1e6
        row["dense_calls_per_million_tokens"][str(tokens)] = (
            measure.median([mine / dense for mine, dense in turns]) / tokens * 1e6
        )
    each = row["dense_calls_per_million_tokens"].values()
    row["spread"] = max(each) / min(each) if each else None
    row["most_spread"] = FLAT_WITHIN if setup.judged else None
    row["ok"] = row["spread"] <= FLAT_WITHIN if setup.judged and each else None
    return [row]


def _short(name: str, tokens: int, setup: Setup) -> list[Row]:
    """Our time against that of one dense SDPA, for lengths at which dense is hard to beat."""
    program, causal, most = SHORT[name]
    rows = []
    for backward in (False, True):
        q, k, v = setup.tensors(tokens, backward)
        attend = compile(program)
        functions = {"ours": _call(attend, q, k, v), "dense": _call(rivals.dense(causal), q, k, v)}
        times = measure.interleaved(functions, 5 * setup.repeats, 3, setup.seconds / 2)
        ratio = measure.median([mine / dense for mine, dense in zip(times["ours"], times["dense"], strict=True)])
        rows.append(
            {
                "case": f"short-{name}-{tokens}",
                "pass": "forward + backward" if backward else "forward",
                "tokens": tokens,
                "lowering": attend.plan(q, k, v).lowering,
                "seconds": times["ours"],
                "dense_seconds": times["dense"],
                "ratio": ratio,
                "most_ratio": most if setup.judged else None,
                "ok": ratio <= most if setup.judged else None,
            }
        )
    return rows
