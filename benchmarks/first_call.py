"""Measure the first call: the kernel built on an empty cache, and loaded from it.

Each in a fresh process.

python benchmarks/first_call.py [--json FILE] [--turns 3] [--check]

Seconds of `import compiled_dilated`, of the first call, and of the second, which is subtracted. torch has been imported and has
multiplied matrices by then.
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
from harness.reports import commit
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
            f"a window is computed by {lowering!r} here, not by the native kernel; see compiled-dilated doctor"
        )
    return {"import": imported, "first": first - second, "second": second}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument(
        "--turns", type=int, default=3, help="empty caches, each filled and then used (%(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads of the calls (%(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    times: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for turn in range(options.turns):
        with tempfile.TemporaryDirectory() as folder:
            for cache, measured in times.items():
                measured.append(seconds(Path(folder, "cache"), options.threads))
                print(
                    f"[{turn + 1}/{options.turns}] {cache}: first call {measured[-1]['first']:.2f} s",
                    flush=True,
                )
    rows: list[dict[str, Any]] = []
    for cache, measured in times.items():
        each = {name: [turn[name] for turn in measured] for name in measured[0]}
        first = measure.median(each["first"])
        row = {f"{name} s": measure.median(values) for name, values in each.items()}
        rows.append(
            {
                "cache": cache,
                **row,
                "most s": MOST[cache],
                "met": first <= MOST[cache],
                "seconds": each,
            }
        )
    print(
        "\n"
        + tabulate(
            [{key: row[key] for key in row if key != "seconds"} for row in rows],
            headers="keys",
            floatfmt=".3f",
        )
    )
    if options.json:
        measure.write_json(
            options.json, {"hardware": measure.hardware(), "commit": commit(), "rows": rows}
        )
    return int(options.check and not all(row["met"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
