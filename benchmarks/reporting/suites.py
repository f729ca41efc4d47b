"""The questions of the report, and the measurements that answer them.

Each suite lists its jobs in a short form (minutes for all suites together) and a full form
(hours). The names of ways are those of the older reports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from compiled_dilated.variants import TABLE

from .jobs import Job
from .peers import big_bird_text

KI, MI = 2**10, 2**20
LONGNET = "longnet((2048, 4096, 8192), (1, 2, 4))"
LONGNET_SPLIT = "longnet((2048, 4096, 8192), (1, 2, 4), heads='split', offsets='grouped')"
WINDOW = "causal() & window(256)"

Value = TypeVar("Value")
# Settings of peers, by program and by the peer's name.
WaysByProgram = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Suite:
    """A question of the report.

    name: of the command line and of the file of records.
    question: the heading of its tables.
    jobs: the jobs of the short form for True, of the full form for False.
    """

    name: str
    question: str
    jobs: Callable[[bool], list[Job]]


def _variants(
    suite: str, ways: Sequence[str], lengths: Sequence[int], **settings: Any
) -> list[Job]:
    """One job per name and length."""
    jobs = []
    for way in ways:
        for tokens in lengths:
            jobs.append(Job(suite, "variant", way, tokens, **settings))
    return jobs


def _first_or_all(quick: bool, *values: Value) -> tuple[Value, ...]:
    """The first value for a short form, else all."""
    return values[:1] if quick else values


def _all(quick: bool) -> list[Job]:
    """Every name of the variants' table at short lengths, beside dense SDPA."""
    names = [row.name for row in TABLE]
    lengths = _first_or_all(quick, KI, 2 * KI)
    jobs = []
    for backward in _first_or_all(quick, False, True):
        jobs += [Job("all", "peer", "SDPA", tokens, backward=backward) for tokens in lengths]
        jobs += _variants("all", names, lengths, backward=backward)
    return jobs


def _long(quick: bool) -> list[Job]:
    """The older report's three names of long runs, beside dense SDPA."""
    ways = ("ImprovedDilatedAttention", "RingDilatedAttention", "BlockSparseRingDilatedAttention")
    lengths = _first_or_all(quick, 8 * KI, 16 * KI, 32 * KI, 64 * KI)
    jobs = []
    for backward in _first_or_all(quick, False, True):
        jobs += [Job("long", "peer", "SDPA", tokens, backward=backward) for tokens in lengths]
        jobs += _variants("long", ways, lengths, backward=backward)
    return jobs


def _extreme(quick: bool) -> list[Job]:
    """From 128K tokens to a million and beyond.

    They are in half precision, as in the older report.
    """
    if quick:
        return _variants("extreme", ("DilatedAttention",), (128 * KI,), dtype="bfloat16", turns=1)
    dilated = (128 * KI, 256 * KI, 512 * KI, 768 * KI, MI, 2 * MI, 4 * MI, 8 * MI)
    blocks = (128 * KI, 256 * KI)
    jobs = _variants("extreme", ("DilatedAttention",), dilated, dtype="bfloat16", turns=3)
    ways = ("BlockSparseRingDilatedAttention",)
    return jobs + _variants("extreme", ways, blocks, dtype="bfloat16", turns=1)


def _ring(quick: bool) -> list[Job]:
    """The older reports' rings and windows, by ring size and length."""
    rings = []
    for name in ("RingDilatedAttentionV2", "RingDilatedAttentionProduction"):
        rings += [f"{name}_r{ranks}" for ranks in (1, 4, 8, 16)]
    windows = ("BlockSparse_LocalWindow_0.9", "BlockSparse_LocalWindow_0.95")
    if quick:
        few = (rings[0], rings[3], windows[1])
        return _variants("ring", few, (4 * KI, 16 * KI), turns=2)
    lengths = (4 * KI, 8 * KI, 16 * KI, 32 * KI, 64 * KI, 128 * KI, 256 * KI)
    jobs = _variants("ring", rings, lengths, turns=3)
    return jobs + _variants("ring", windows, lengths[:5], turns=3)


def _single(quick: bool) -> list[Job]:
    """The four standardized ring attentions on one machine, at most 4K tokens."""
    ways = (
        "StandardRingAttention",
        "DistributedRingAttention",
        "HilbertRingAttention",
        "BlockSparseRingAttention",
    )
    lengths = _first_or_all(quick, KI, 2 * KI, 4 * KI)
    return _variants("single", ways, lengths)


def _memory(quick: bool) -> list[Job]:
    """Bytes beyond the inputs, by length, of forward + backward."""
    lengths = (4 * KI, 16 * KI) if quick else tuple(512 * 2**i for i in range(8))
    ways = ("DilatedAttention", "BlockSparse_LocalWindow_0.95")
    if not quick:
        ways += ("HilbertRingAttention", "StandardRingAttention")
    jobs = []
    for backward in (False, True):
        # A window of a share of all pairs costs N^2: its longest lengths take minutes.
        jobs += _variants("memory", ways, lengths, backward=backward, turns=1)
        for tokens in lengths:
            if tokens <= 32 * KI:
                job = Job("memory", "peer", "SDPA", tokens, backward=backward, turns=1)
                jobs.append(job)
    return jobs


def _limits(quick: bool) -> list[Job]:
    """The longest sequences and largest batches within limits of memory."""
    jobs = []
    for way, program in {"LongNet": LONGNET, "window 256": WINDOW}.items():
        for gib in (1, 80) if quick else (1, 2, 4, 8, 16, 80):
            for backward in (False, True):
                settings = {"gib": gib}
                job = Job(
                    "limits", "limit", way, 16 * KI, program, settings=settings, backward=backward
                )
                jobs.append(job)
    return jobs


def _billion(quick: bool) -> list[Job]:
    """Sequences beyond any memory, through the older report's ring sizes."""
    sizes = [(8 * KI, 1), (128 * KI, 32)]
    if not quick:
        # The last takes about an hour: `--only "ring of 262,144" --seconds 7200`.
        sizes += [(MI, 256), (16 * MI, 4096), (64 * MI, 16384), (1024 * MI, 262144)]
    settings: dict[str, Any] = {"heads": 1, "head_dim": 16, "program": LONGNET}
    jobs = []
    for tokens, ranks in sizes:
        way = f"ring of {ranks:,}"
        jobs.append(Job("billion", "billion", way, tokens, ranks=ranks, **settings))
    return jobs


def _hilbert(quick: bool) -> list[Job]:
    """A window on a grid, by rows and along a Hilbert curve."""
    jobs = []
    for side in _first_or_all(quick, 64, 256):
        programs = {
            "row-major": f"neighborhood(({side}, {side}), 12)",
            "Hilbert": f"hilbert_window(({side}, {side}), 12)",
        }
        for backward in _first_or_all(quick, False, True):
            for way, program in programs.items():
                job = Job("hilbert", "program", way, side**2, program, backward=backward)
                jobs.append(job)
    return jobs


def _dtypes(quick: bool) -> list[Job]:
    """LongNet and a window in every dtype."""
    jobs = []
    for dtype in ("float32", "bfloat16", "float16"):
        for way, program in {"LongNet": LONGNET, "window 256": WINDOW}.items():
            for backward in _first_or_all(quick, False, True):
                tokens = 4 * KI if quick else 16 * KI
                job = Job("dtypes", "program", way, tokens, program, dtype=dtype, backward=backward)
                jobs.append(job)
    return jobs


def _peers(quick: bool) -> list[Job]:
    """Peers and this library on the same program and inputs."""
    jobs = []
    for tokens in _first_or_all(quick, 4 * KI, 16 * KI):
        side = 64 if tokens == 4 * KI else 128
        ways_by_program: WaysByProgram = {
            **_ways_of_torch(),
            "window(256)": {"Longformer of transformers": {"window": 256}},
            LONGNET: {"torchscale": {}},
            LONGNET_SPLIT: {"first LongNet port": {}},
            f"neighborhood(({side}, {side}), 6, edges='shift')": {
                "NATTEN": {"side": side, "kernel": 13}
            },
            big_bird_text(tokens, 64): {"BigBird of transformers": {"block": 64}},
        }
        ways_by_program["causal()"]["ring-attention-pytorch"] = {}
        ways_by_program[WINDOW]["local-attention"] = {"window": 256}
        jobs += _beside_peers(ways_by_program, tokens, "float32", quick)
    if not quick:
        for dtype in ("bfloat16", "float16"):
            jobs += _beside_peers(_ways_of_torch(), 16 * KI, dtype, quick)
    return jobs


def _ways_of_torch() -> WaysByProgram:
    """Torch's own ways, which take every dtype."""
    out: WaysByProgram = {}
    for program in ("causal()", WINDOW):
        out[program] = {"SDPA": {"program": program}, "FlexAttention": {"program": program}}
    return out


def _beside_peers(
    ways_by_program: WaysByProgram, tokens: int, dtype: str, quick: bool
) -> list[Job]:
    """This library's job for each program and pass, and its peers' jobs."""
    jobs = []
    for program, ways in ways_by_program.items():
        for backward in _first_or_all(quick, False, True):
            options: dict[str, Any] = {"dtype": dtype, "backward": backward, "turns": 3}
            jobs.append(Job("peers", "program", "ours", tokens, program, **options))
            for way, settings in ways.items():
                job = Job("peers", "peer", way, tokens, program, settings=settings, **options)
                jobs.append(job)
    return jobs


_ALL_SUITES = (
    Suite("all", "Every name at short lengths", _all),
    Suite("single", "The standardized ring attentions on one machine", _single),
    Suite("long", "Long sequences", _long),
    Suite("extreme", "Extreme sequences", _extreme),
    Suite("ring", "Rings and windows by length", _ring),
    Suite("memory", "Memory by length", _memory),
    Suite("limits", "Memory limits", _limits),
    Suite("billion", "Sequences that are in no memory", _billion),
    Suite("hilbert", "Tokens of a grid by rows and along a Hilbert curve", _hilbert),
    Suite("dtypes", "Precisions", _dtypes),
    Suite("peers", "What people use today", _peers),
)
SUITES = {suite.name: suite for suite in _ALL_SUITES}
