"""What a ring moves, holds and costs, against a plain ring, all-gather and one device; out of core against in memory.

python benchmarks/ring.py [--json FILE] [--only exchange|processes|peak|streamed|longest]

exchange    bytes and steps of 8 simulated ranks, every step executed; a plain ring and an all-gather move all rows to all ranks
processes   1 and 2 gloo processes of one thread, forward + backward, against one process with one thread
peak        most held by one rank at 4096 tokens a rank, from 8 to 262,144 ranks; some ranks of each executed
streamed    a million tokens from files to a file against the same in memory
longest     float16, 8 heads of 64, LongNet forward, a process of at most 8 GiB: in memory the most tokens that fit, out of core
            twice as many from a generator to a file; minutes, so only when asked for
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

import compiled_dilated as cd
from compiled_dilated import masks, measure
from compiled_dilated.calls import Call
from compiled_dilated.heads import HeadRange
from compiled_dilated.ring import sources
from compiled_dilated.ring.ledgers import Ledger
from compiled_dilated.ring.plans import layouts_of
from compiled_dilated.ring.schedules import Schedule
from compiled_dilated.ring.sources import GeneratedSource
from compiled_dilated.ring.workers import Forward

LONGNET = "longnet((2048, 4096, 8192), (1, 2, 4), causal=True)"
PROGRAMS = {
    "causal": masks.causal(),
    "window 256": masks.causal() & masks.window(256),
    "window 1024 | sinks 4": masks.causal() & (masks.window(1024) | masks.sinks(4)),
    "LongNet": cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True),
    "Hilbert window 12": cd.hilbert_window((128, 128), 12),
}
RANKS, HEADS, HEAD_DIM, TOKENS = 8, 8, 64, 16384
ROOT = Path(__file__).parent.parent
_LIMIT_BYTES = 8 * 2**30

Row = dict[str, Any]


def exchange() -> list[Row]:
    """Simulated ranks against one device."""
    rows = []
    q, k, v = (torch.randn(1, HEADS, TOKENS, HEAD_DIM) for _ in range(3))
    everything = (RANKS - 1) * (k.nbytes + v.nbytes)
    for name, program in PROGRAMS.items():
        ring, alone = cd.compile(program, ranks=RANKS), cd.compile(program)
        with torch.no_grad():
            times = measure.interleaved(
                {"ring": partial(ring, q, k, v), "alone": partial(alone, q, k, v)}, repeats=3
            )
        ledger, plan = ring.ring.ledger, ring.plan(q, k, v)
        rows.append(
            {
                "program": name,
                "layout": plan.schedule.layout.name,
                "steps": ledger.steps,
                "of a plain ring": RANKS * RANKS,
                "MiB moved": ledger.received_bytes / 2**20,
                "of plain ring or all-gather": ledger.received_bytes / everything,
                "rank holds MiB": ledger.most_held_bytes / 2**20,
                "all-gather holds MiB": (q.nbytes * 2 // RANKS + k.nbytes + v.nbytes) / 2**20,
                "time / one device": measure.median(times["ring"]) / measure.median(times["alone"]),
            }
        )
    return rows


def processes() -> list[Row]:
    """gloo processes of one thread each."""
    rows = []
    for ranks in (1, 2):
        command = [
            "ring",
            "launch",
            LONGNET,
            "--shape",
            f"1,{HEADS},{TOKENS},{HEAD_DIM}",
            "--ranks",
            str(ranks),
            "--json",
        ]
        run = subprocess.run(
            [sys.executable, "-m", "compiled_dilated.cli", *command],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(run.stdout)
        rows.append(
            {
                "processes": ranks,
                "layout": found["layout"],
                "seconds": max(row["seconds"] for row in found["ranks"]),
                "MiB received, most": max(row["received_bytes"] for row in found["ranks"]) / 2**20,
                "bits as simulated": found["ok"],
            }
        )
    return rows


def peak() -> list[Row]:
    """Sampled ranks of rings that grow with their sequence."""
    rows = []
    program, size = cd.longnet((2048, 4096, 8192), (1, 2, 4)), 4096
    for ranks in (8, 512, 32768, 262144):
        tokens = ranks * size
        schedule = Schedule(program, layouts_of(program, tokens, ranks, "contiguous")[0], 1, 1)
        q, k, v = (GeneratedSource((1, 1, tokens, 16), 0, stream) for stream in range(3))
        ledger, heads = Ledger(), HeadRange(0, 1, 1)
        with measure.resident_peak() as resident:
            for rank in (0, 1, ranks // 2, ranks - 1):
                own = schedule.layout.runs(rank)[0]
                worker = Forward(
                    schedule,
                    rank,
                    Call(0.25),
                    *(sources.read(source, heads, own) for source in (q, k, v)),
                )
                for step in schedule.steps(rank):
                    received = [
                        (sources.read(k, m.kv_heads, m.rows), sources.read(v, m.kv_heads, m.rows))
                        for m in step.messages
                    ]
                    ledger.note(received, (worker.q, worker.k, worker.v, worker.out, worker.lse))
                    worker.compute(step, received)
            process = resident()
        summary = schedule.summary()
        rows.append(
            {
                "ranks": ranks,
                "tokens": tokens,
                "rank holds KiB": ledger.most_held_bytes / 2**10,
                "process MiB": process / 2**20,
                "rows received by a rank, most": int(summary.rows.max()),
            }
        )
    return rows


def streamed() -> list[Row]:
    """Files to a file against memory to memory."""
    tokens, heads = 2**20, 2
    program = cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True)
    with tempfile.TemporaryDirectory() as home:
        paths, journal = (
            [Path(home) / f"{name}.npy" for name in ("q", "k", "v", "out")],
            Path(home) / "journal",
        )
        random = np.random.default_rng(0)
        for path in paths[:3]:
            np.save(path, random.standard_normal((1, heads, tokens, HEAD_DIM), dtype=np.float32))
        run, alone = cd.compile(program, ranks=16, transport="streamed"), cd.compile(program)
        q, k, v = (torch.from_numpy(np.load(path)) for path in paths[:3])

        def afresh() -> None:
            for path in (paths[3], journal):
                path.unlink(missing_ok=True)
            run(*paths, journal=journal)

        with torch.no_grad():
            truth = alone(q, k, v)
            times = measure.interleaved(
                {"inside": lambda: alone(q, k, v), "outside": afresh}, repeats=3, warmup=0
            )
        inside, outside = (measure.median(times[name]) for name in ("inside", "outside"))
        error = (torch.from_numpy(np.load(paths[3])) - truth).abs().max().item()
    return [
        {
            "tokens": tokens,
            "in memory s": inside,
            "streamed s": outside,
            "ratio": outside / inside,
            "differ by": error,
        }
    ]


def longest() -> list[Row]:
    """Each run a process of its own, its peak the kernel's own high-water mark of all that it had in memory."""
    of_a_token = 4 * HEADS * HEAD_DIM * 2  # q, k, v and out
    tokens, row = int(0.95 * _LIMIT_BYTES) // of_a_token, Row()
    while not row or row["process GiB"] > _LIMIT_BYTES / 2**30:
        tokens = (tokens - tokens // 64) // 8192 * 8192
        row = _apart("memory", tokens)
    return [row, _apart("streamed", 2 * tokens)]


def _apart(way: str, tokens: int) -> Row:
    code = f"from benchmarks.ring import alone; alone({way!r}, {tokens})"
    run = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    found: Row = json.loads(run.stdout)
    return found


def alone(way: str, tokens: int) -> None:
    """The whole life of one process of `longest`; prints its row."""
    torch.set_num_threads(2)
    shape, program = (
        (1, HEADS, tokens, HEAD_DIM),
        cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True),
    )
    with measure.resident_peak() as resident, torch.no_grad():
        if way == "memory":
            q, k, v = (torch.randn(shape, dtype=torch.float16) for _ in range(3))
            attend = cd.compile(program)
            seconds = measure.timed(lambda: attend(q, k, v))
        else:
            sources = [GeneratedSource(shape, 0, stream, torch.float16) for stream in range(3)]
            ring = cd.compile(program, ranks=tokens // 65536, transport="streamed")
            with tempfile.TemporaryDirectory() as home:
                seconds = measure.timed(lambda: ring(*sources, Path(home) / "out.npy"))
        held = resident()
    row = {
        "way": way,
        "tokens": tokens,
        "seconds": seconds,
        "tokens/s": tokens / seconds,
        "process GiB": held / 2**30,
    }
    print(json.dumps(row))


TABLES = {
    "exchange": exchange,
    "processes": processes,
    "peak": peak,
    "streamed": streamed,
    "longest": longest,
}
_ASKED_FOR = {"longest"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument(
        "--only", choices=TABLES, action="append", help="tables to measure; all if not given"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    tables = {}
    for name in arguments.only or [each for each in TABLES if each not in _ASKED_FOR]:
        tables[name] = TABLES[name]()
        print(f"\n{name}\n{tabulate(tables[name], headers='keys', floatfmt='.3g')}", flush=True)
    if arguments.json:
        measure.write_json(arguments.json, {"hardware": measure.hardware(), "tables": tables})


if __name__ == "__main__":
    main()
