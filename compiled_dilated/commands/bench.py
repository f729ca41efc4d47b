"""`compiled-dilated bench`: how fast attention is, against dense SDPA and compiled FlexAttention in the same run.

Useful FLOPs are 4 * D per allowed pair and head, a pair that two branches allow counted twice; a backward counts 2.5 times its
forward. The dense rate is that of SDPA over all pairs of `dense_tokens` tokens. Dense calls stand before and after each call that
is compared to them, and what is reported is the median of the turns' ratios: a machine that others use as well changes its speed
from second to second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from .. import masks, measure
from ..attend import compile, plan
from ..masks import Mask
from ..orders import Order, identity
from ..programs import Program, as_program, hilbert_window, local_window, longnet
from . import rivals
from .arguments import Device, Dtype
from .rivals import Attention

_BACKWARD = 2.5
# Above so many seconds (at the rate below) a call is its own warm-up.
_LONG_SECONDS, _SLOW_RATE = 4.0, 60e9
_RIVAL_TURNS = 3
# A call stands between dense calls that take together about one part in so many of its time.
_DENSE_SHARE = 4

Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """How to measure: B 1, `heads` heads of width `head_dim`; at most `repeats` turns, none started after `seconds`."""

    heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    dense_tokens: int = 4096
    repeats: int = 7
    seconds: float = 10.0

    @property
    def judged(self) -> bool:
        """Whether the required figures, which are for float32 on a CPU, apply."""
        return (self.device, self.dtype) == ("cpu", "float32")

    def tensors(self, tokens: int, backward: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, the same in every run."""
        random = torch.Generator(self.device).manual_seed(0)
        shape = (1, self.heads, tokens, self.head_dim)
        q, k, v = (torch.randn(shape, generator=random, device=self.device, dtype=getattr(torch, self.dtype)) for _ in range(3))
        return q.requires_grad_(backward), k.requires_grad_(backward), v.requires_grad_(backward)

    def lacks_memory(self, tokens: int, backward: bool) -> str | None:
        """Why so many tokens do not fit, or None."""
        import psutil

        tensors = 9 if backward else 4
        wanted = 1.25 * tensors * tokens * self.heads * self.head_dim * getattr(torch, self.dtype).itemsize
        free = torch.cuda.mem_get_info()[0] if self.device == "cuda" else psutil.virtual_memory().available
        return None if wanted < free else f"needs {wanted / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"

    def flops(self, allowed_pairs: int, backward: bool) -> float:
        """Useful FLOPs of that many pairs, over all heads."""
        return 4 * self.head_dim * allowed_pairs * (1 + _BACKWARD if backward else 1)

    def dense_flops(self, backward: bool) -> float:
        """Those of the dense call that everything is compared to."""
        return self.flops(self.heads * self.dense_tokens**2, backward)


@dataclass(frozen=True)
class Rival:
    """Something that our time is compared to: `make(setup)` builds it; its time must be `least` times ours."""

    name: str
    least: float
    make: Callable[[Setup], Attention]


@dataclass(frozen=True)
class Case:
    """A program whose useful rate must reach a share of the dense rate, forward and forward + backward."""

    name: str
    program: Program
    tokens: int
    forward: float
    both: float
    rivals: tuple[Rival, ...] = ()
    pairs_per_head: int | None = None

    def pairs(self, setup: Setup) -> int:
        """Allowed pairs over all heads: as the plan counts them, or as the case says where there are too many to count."""
        if self.pairs_per_head is not None:
            return self.pairs_per_head * setup.heads
        counted = plan(self.program, (1, setup.heads, self.tokens, setup.head_dim)).useful_pairs
        assert counted is not None
        return counted


def _flex(name: str, least: float, program: Program, tokens: int, order: Order = identity(), tile: int = 128) -> Rival:
    return Rival(name, least, lambda setup: rivals.flex(program, tokens, setup.heads, setup.device, order, tile))


def _longnet_case(tokens: int, against: bool) -> Case:
    # The union's block mask of 128K tokens takes torch minutes, so that flex is measured at 16K alone.
    flex = (_flex("flex, union", 7.0, LONGNET, tokens),) if against else ()
    return Case(f"longnet-{tokens // 1024}k", LONGNET, tokens, 0.93, 0.85, flex)


def _window_case(tokens: int) -> Case:
    program = local_window(256)
    flex = tuple(_flex(f"flex, tile {tile}", 1.0, program, tokens, tile=tile) for tile in (64, 128))
    return Case(f"window-{tokens // 1024}k", program, tokens, 0.60, 0.52, flex)


def _hilbert_case(side: int) -> Case:
    program, grid = hilbert_window((side, side), 12), (side, side)
    row_major = as_program(masks.neighborhood(grid, 12))
    against = (
        Rival("ours, row-major", 1.0, lambda setup: compile(row_major)),
        _flex("flex, row-major", 1.0, row_major, side * side),
        _flex("flex, Hilbert order", 1.0, row_major, side * side, program.branches[0].order),
    )
    return Case(f"hilbert-{side}x{side}", program, side * side, 0.35, 0.33, against, pairs_within(side, 12) ** 2)


def pairs_within(size: int, radius: int) -> int:
    """Pairs of coordinates along one axis that are at most `radius` apart."""
    return size + 2 * sum(size - distance for distance in range(1, min(radius, size - 1) + 1))


LONGNET = longnet((2048, 4096, 8192), (1, 2, 4))
CASES = (
    _longnet_case(2**14, True),
    _longnet_case(2**17, False),
    _window_case(2**14),
    _window_case(2**16),
    _hilbert_case(64),
    _hilbert_case(256),
)
QUICK_CASES = tuple(case for case in CASES if case.tokens <= 2**14)

FLAT: Mapping[str, Callable[[int], Program]] = {
    "longnet": lambda tokens: LONGNET,
    "window": lambda tokens: local_window(256),
    "hilbert": lambda tokens: hilbert_window(_grid(tokens), 12),
}
FLAT_WITHIN = 1.15

SHORT: Mapping[str, tuple[Program | Mask, bool, float]] = {
    # name: program, whether dense is causal, the most that our time may be as a multiple of dense
    "longnet": (LONGNET, False, 1.5),
    "causal": (masks.causal(), True, 1.1),
    "window": (masks.window(1024), False, 1.5),
}
SHORT_TOKENS = (512, 1024, 2048)


def _grid(tokens: int) -> tuple[int, int]:
    """Rows and columns, as near to a square as powers of two allow."""
    rows = 2 ** (int(math.log2(tokens)) // 2)
    return rows, tokens // rows


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


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Shorter sequences, fewer turns: under a minute.")] = False,
    case: Annotated[list[str] | None, typer.Option(help="Only measurements whose name holds this text; may be repeated.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="float32 on a CPU, bfloat16 on a GPU if not given.")] = None,
    device: Annotated[Device, typer.Option(help="What to measure on.")] = Device.cpu,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    list_: Annotated[bool, typer.Option("--list", help="Print the names of the measurements and stop.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a required figure is missed.")] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="OUT", dir_okay=False, help="Write all figures, with the hardware, here.")
    ] = None,
) -> None:
    """Measure attention against dense SDPA and compiled FlexAttention: under ten minutes on two cores that do nothing else.

    The figures required are for float32 on a CPU; elsewhere figures are reported and not judged.
    """
    chosen = [each for each in measurements(quick) if not case or any(text in each.name for text in case)]
    if not chosen:
        raise typer.BadParameter(f"no measurement's name holds {' or '.join(map(repr, case or []))}; see --list")
    if list_:
        typer.echo("\n".join(each.name for each in chosen))
        return
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device cuda: torch {torch.__version__} finds no GPU; see compiled-dilated doctor")
    torch.set_num_threads(threads)
    gpu = device is Device.cuda
    setup = Setup(
        dtype=dtype.value if dtype else "bfloat16" if gpu else "float32",
        device=device.value,
        dense_tokens=2**14 if gpu else 2**12,
        repeats=3 if quick else 21 if gpu else 7,
        seconds=1.0 if quick else 15.0,
    )
    record: dict[str, Any] = {
        "hardware": measure.hardware(),
        "setup": asdict(setup),
        "quick": quick,
        "complete": False,
        "rows": [],
    }
    for name, rows in _progress(chosen, setup):
        record["rows"] += [{"table": name, **row} for row in rows]
        record["complete"] = len({row["case"] for row in record["rows"]}) == len(chosen)
        if json:
            measure.write_json(json, record)
    typer.echo(tables(record["rows"]))
    missed = [row["case"] for row in record["rows"] if not met(row)]
    if missed:
        typer.echo(f"\nmissed: {', '.join(dict.fromkeys(missed))}")
    raise typer.Exit(1 if check and missed else 0)


def _progress(chosen: list[Measurement], setup: Setup) -> Iterator[tuple[str, list[Row]]]:
    """Runs the measurements, the one at work named on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for each in chosen:
            progress.update(task, description=each.name)
            yield each.table, each.run(setup)
            progress.advance(task)


def met(row: Row) -> bool:
    """Whether nothing that the row requires is missed."""
    return row.get("ok") is not False and all(rival["ok"] is not False for rival in row.get("rivals", {}).values())


def tables(rows: list[Row]) -> str:
    """The figures for a person: rates, time per token, short sequences."""
    from tabulate import tabulate

    layouts: dict[str, tuple[list[str], Callable[[Row], list[str]]]] = {
        "rate": (["case", "pass", "ms", "useful GFLOP/s", "of dense", "required", "ok", "against"], _rate_cells),
        "flat": (["case", "microseconds a token", "spread", "at most", "ok"], _flat_cells),
        "short": (["case", "pass", "ms", "dense ms", "times dense", "at most", "ok", "lowering"], _short_cells),
    }
    out = []
    for table, (headers, cells) in layouts.items():
        body = [cells(row) for row in rows if row["table"] == table]
        if body:
            out.append(tabulate(body, headers=headers, disable_numparse=True))
    return "\n\n".join(out)


def _mark(ok: bool | None) -> str:
    return {True: "yes", False: "NO", None: ""}[ok]


def _figure(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _rate_cells(row: Row) -> list[str]:
    if "skipped" in row:
        return [row["case"], row["pass"], "-", "-", "-", "-", "", row["skipped"]]
    against = "; ".join(
        f"{name} {rival['ratio']:.2f}x" + ("" if rival["ok"] is not False else f" (NO: at least {rival['least']:g}x)")
        for name, rival in row["rivals"].items()
    )
    rate = [
        _figure(1e3 * measure.median(row["seconds"]), 1),
        _figure(row["useful_gflops"], 0),
        _figure(row["share"]),
        _figure(row["required_share"]),
    ]
    return [row["case"], row["pass"], *rate, _mark(row["ok"]), against]


def _flat_cells(row: Row) -> list[str]:
    each = ", ".join(f"{int(tokens) // 1024}K {value:.2f}" for tokens, value in row["microseconds_per_token"].items())
    skipped = "".join(f"; {int(tokens) // 1024}K skipped: {reason}" for tokens, reason in row["skipped"].items())
    return [row["case"], each + skipped, _figure(row["spread"]), _figure(row["most_spread"]), _mark(row["ok"])]


def _short_cells(row: Row) -> list[str]:
    times = [_figure(1e3 * measure.median(row[name]), 2) for name in ("seconds", "dense_seconds")]
    return [
        row["case"],
        row["pass"],
        *times,
        _figure(row["ratio"]),
        _figure(row["most_ratio"]),
        _mark(row["ok"]),
        row["lowering"],
    ]
