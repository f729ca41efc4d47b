"""Measure the bytes, memory and time of rings.

Rivals are a plain ring, all-gather and one device.

python benchmarks/ring.py [--json FILE] [--only exchange|processes|peak|streamed|longest]

exchange    bytes and steps of 8 simulated ranks, every step executed; a plain ring and an
            all-gather move all rows to all ranks
processes   1 and 2 gloo processes of one thread, forward + backward
peak        peak memory of one rank of 4096 tokens, in rings of 8 to 262,144 ranks; some ranks of
            each are executed
streamed    a million tokens from files to a file, against the same in memory
longest     LongNet in float16, 8 heads of 64, forward, a process of at most 8 GiB: in memory the
            most tokens that fit, out of core twice as many from a generator to a file; it takes
            minutes and runs with --only longest alone
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
from harness.runs import origin
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
CAUSAL_LONGNET = cd.longnet((2048, 4096, 8192), (1, 2, 4), causal=True)
PROGRAMS = {
    "causal": masks.causal(),
    "window 256": masks.causal() & masks.window(256),
    "window 1024 | sinks 4": masks.causal() & (masks.window(1024) | masks.sinks(4)),
    "LongNet": CAUSAL_LONGNET,
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
    # A plain ring moves all keys and values to all other ranks.
    all_bytes = (RANKS - 1) * (k.nbytes + v.nbytes)
    for name, program in PROGRAMS.items():
        ring, alone = cd.compile(program, ranks=RANKS), cd.compile(program)
        functions = {"ring": partial(ring, q, k, v), "alone": partial(alone, q, k, v)}
        with torch.no_grad():
            seconds = measure.medians(measure.interleaved(functions, repeats=3))
        ledger, plan = ring.ring.ledger, ring.plan(q, k, v)
        row = {
            "program": name,
            "layout": plan.schedule.layout.name,
            "steps": ledger.steps,
            "of a plain ring": RANKS * RANKS,
            "MiB moved": ledger.received_bytes / 2**20,
            "of plain ring or all-gather": ledger.received_bytes / all_bytes,
            "rank holds MiB": ledger.most_held_bytes / 2**20,
            "all-gather holds MiB": (q.nbytes * 2 // RANKS + k.nbytes + v.nbytes) / 2**20,
            "time / one device": seconds["ring"] / seconds["alone"],
        }
        rows.append(row)
    return rows


def processes() -> list[Row]:
    """gloo processes of one thread."""
    rows = []
    shape = f"1,{HEADS},{TOKENS},{HEAD_DIM}"
    for count in (1, 2):
        command = ["ring", "launch", LONGNET, "--shape", shape, "--ranks", str(count), "--json"]
        command = [sys.executable, "-m", "compiled_dilated.cli", *command]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        record = json.loads(run.stdout)
        ranks = record["ranks"]
        row = {
            "processes": count,
            "layout": record["layout"],
            "seconds": max(rank["seconds"] for rank in ranks),
            "MiB received, most": max(rank["received_bytes"] for rank in ranks) / 2**20,
            "bits as simulated": record["ok"],
        }
        rows.append(row)
    return rows


def peak() -> list[Row]:
    """Sampled ranks of rings that grow with their sequence."""
    rows = []
    program, size = cd.longnet((2048, 4096, 8192), (1, 2, 4)), 4096
    for ranks in (8, 512, 32768, 262144):
        tokens = ranks * size
        schedule = Schedule(program, layouts_of(program, tokens, ranks, "contiguous")[0], 1, 1)
        ledger = Ledger()
        with measure.resident_peak() as resident:
            for rank in (0, 1, ranks // 2, ranks - 1):
                execute(schedule, rank, tokens, ledger)
            process_bytes = resident()
        row = {
            "ranks": ranks,
            "tokens": tokens,
            "rank holds KiB": ledger.most_held_bytes / 2**10,
            "process MiB": process_bytes / 2**20,
            "rows received by a rank, most": int(schedule.summary().rows.max()),
        }
        rows.append(row)
    return rows


def execute(schedule: Schedule, rank: int, tokens: int, ledger: Ledger) -> None:
    """Execute all steps of a rank, on generated tensors.

    ledger: counts the bytes of steps.
    """
    q, k, v = (GeneratedSource((1, 1, tokens, 16), 0, stream) for stream in range(3))
    rows = schedule.layout.runs(rank)[0]
    shards = [sources.read(source, HeadRange(0, 1, 1), rows) for source in (q, k, v)]
    worker = Forward(schedule, rank, Call(0.25), *shards)
    for step in schedule.steps(rank):
        received = []
        for message in step.messages:
            keys = sources.read(k, message.kv_heads, message.rows)
            received.append((keys, sources.read(v, message.kv_heads, message.rows)))
        ledger.note(received, (worker.q, worker.k, worker.v, worker.out, worker.lse))
        worker.compute(step, received)


def streamed() -> list[Row]:
    """Files to a file against memory to memory."""
    tokens, heads = 2**20, 2
    with tempfile.TemporaryDirectory() as home:
        paths = [Path(home, f"{name}.npy") for name in ("q", "k", "v", "out")]
        journal = Path(home, "journal")
        random = np.random.default_rng(0)
        for path in paths[:3]:
            np.save(path, random.standard_normal((1, heads, tokens, HEAD_DIM), dtype=np.float32))
        # The same attention from files to a file, and from memory to memory.
        run = cd.compile(CAUSAL_LONGNET, ranks=16, transport="streamed")
        alone = cd.compile(CAUSAL_LONGNET)
        q, k, v = (torch.from_numpy(np.load(path)) for path in paths[:3])

        def run_from_start() -> None:
            # With a journal of an earlier run there would be nothing left to compute.
            for path in (paths[3], journal):
                path.unlink(missing_ok=True)
            run(*paths, journal=journal)

        functions = {"memory": lambda: alone(q, k, v), "streamed": run_from_start}
        with torch.no_grad():
            truth = alone(q, k, v)
            times = measure.interleaved(functions, repeats=3, warmup=0)
        error = (torch.from_numpy(np.load(paths[3])) - truth).abs().max().item()
    seconds = measure.medians(times)
    row = {"tokens": tokens, "in memory s": seconds["memory"], "streamed s": seconds["streamed"]}
    ratio = seconds["streamed"] / seconds["memory"]
    return [row | {"ratio": ratio, "differ by": error}]


def longest() -> list[Row]:
    """Measure runs in processes of their own, with the process's peak."""
    token_bytes = 4 * HEADS * HEAD_DIM * 2  # q, k, v and out
    # Down in steps of 1/64, until the process fits.
    tokens, row = int(0.95 * _LIMIT_BYTES) // token_bytes, Row()
    while not row or row["process GiB"] > _LIMIT_BYTES / 2**30:
        tokens = (tokens - tokens // 64) // 8192 * 8192
        row = _apart("memory", tokens)
    return [row, _apart("streamed", 2 * tokens)]


def _apart(way: str, tokens: int) -> Row:
    code = f"from benchmarks.ring import alone; alone({way!r}, {tokens})"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    row: Row = json.loads(run.stdout)
    return row


def alone(way: str, tokens: int) -> None:
    """Run one process of `longest`; prints its row."""
    torch.set_num_threads(2)
    shape = (1, HEADS, tokens, HEAD_DIM)
    with measure.resident_peak() as resident, torch.no_grad():
        if way == "memory":
            q, k, v = (torch.randn(shape, dtype=torch.float16) for _ in range(3))
            attend = cd.compile(CAUSAL_LONGNET)
            seconds = measure.timed(lambda: attend(q, k, v))
        else:
            inputs = [GeneratedSource(shape, 0, stream, torch.float16) for stream in range(3)]
            ring = cd.compile(CAUSAL_LONGNET, ranks=tokens // 65536, transport="streamed")
            with tempfile.TemporaryDirectory() as home:
                seconds = measure.timed(lambda: ring(*inputs, Path(home) / "out.npy"))
        process_bytes = resident()
    row = {"way": way, "tokens": tokens, "seconds": seconds, "tokens/s": tokens / seconds}
    print(json.dumps(row | {"process GiB": process_bytes / 2**30}))


TABLES = {
    "exchange": exchange,
    "processes": processes,
    "peak": peak,
    "streamed": streamed,
    "longest": longest,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    text = "tables to measure; all but longest if not given"
    parser.add_argument("--only", choices=TABLES, action="append", help=text)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    tables = {}
    for name in arguments.only or [name for name in TABLES if name != "longest"]:
        tables[name] = TABLES[name]()
        print(f"\n{name}\n{tabulate(tables[name], headers='keys', floatfmt='.3g')}", flush=True)
    if arguments.json:
        measure.write_json(arguments.json, origin() | {"tables": tables})


if __name__ == "__main__":
    main()
