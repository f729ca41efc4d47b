"""Measure the first call: its kernel built, and loaded from the cache.

python benchmarks/first_call.py [--json FILE] [--turns 3] [--check]

Each in a fresh process that has imported torch and multiplied matrices. Seconds of `import
compiled_dilated`, of the first call (the second is subtracted), and of the second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness.runs import origin
from tabulate import tabulate

from compiled_dilated import measure

# The most that the first call may add, on two cores that do nothing else.
MOST = {"cold": 5.0, "warm": 0.2}
CHILD = """
import json, time
import torch
torch.set_num_threads({threads})
q = torch.randn(1, 8, 1024, 64)
q @ q.mT
clock = time.perf_counter
times = [clock()]
import compiled_dilated as cd
attend = cd.compile(cd.masks.window(256))
times.append(clock())
for _ in range(2):
    attend(q, q, q)
    times.append(clock())
lowering = attend.plan(q, q, q).lowering
print(json.dumps([lowering, *(after - before for before, after in zip(times, times[1:]))]))
"""


def seconds(cache: Path, threads: int) -> dict[str, float]:
    """Measure a fresh process that uses this cache, in seconds."""
    environment = {**os.environ, "COMPILED_DILATED_CACHE": str(cache)}
    code = CHILD.format(threads=threads)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    lowering, imported, first, second = json.loads(done.stdout)
    if lowering != "native":
        raise SystemExit(
            f"a window is computed by {lowering!r} here, not by the native kernel; "
            "see compiled-dilated doctor"
        )
    return {"import": imported, "first": first - second, "second": second}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    text = "empty caches, each filled and then used (%(default)s)"
    parser.add_argument("--turns", type=int, default=3, help=text)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # The first process of a turn fills the cache of the second.
    times: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for turn in range(options.turns):
        with tempfile.TemporaryDirectory() as folder:
            for cache, turns in times.items():
                turns.append(seconds(Path(folder, "cache"), options.threads))
                first = f"first call {turns[-1]['first']:.2f} s"
                print(f"[{turn + 1}/{options.turns}] {cache}: {first}", flush=True)
    rows = [row_of(cache, turns) for cache, turns in times.items()]
    table = []
    for row in rows:
        table.append(dict(row))
        del table[-1]["seconds"]
    print("\n" + tabulate(table, headers="keys", floatfmt=".3f"))
    if options.json:
        record = origin() | {"rows": rows}
        measure.write_json(options.json, record)
    return int(options.check and not all(row["met"] for row in rows))


def row_of(cache: str, turns: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the turns with a cold or a warm cache."""
    times: dict[str, list[float]] = {}
    for turn in turns:
        for name, value in turn.items():
            times.setdefault(name, []).append(value)
    row: dict[str, Any] = {"cache": cache}
    for name, median in measure.medians(times).items():
        row[f"{name} s"] = median
    met = row["first s"] <= MOST[cache]
    return row | {"most s": MOST[cache], "met": met, "seconds": times}


if __name__ == "__main__":
    raise SystemExit(main())
