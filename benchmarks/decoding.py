"""One query against a cache of 64K tokens, against SDPA over just the keys that it sees.

python benchmarks/decoding.py [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from tabulate import tabulate

import compiled_dilated as cd
from compiled_dilated import masks, measure

TOKENS, HEADS, HEAD_DIM, CALLS, MOST = 65536, 8, 64, 50, 1.3
PROGRAMS = {
    "causal": masks.causal(),
    "window 256": masks.causal() & masks.window(256),
    "window 1024 | sinks 4": masks.causal() & (masks.window(1024) | masks.sinks(4)),
    "segments 2048": masks.causal() & masks.segments(2048),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", type=Path, help="where to write the figures")
    target = arguments.parse_args().json
    torch.set_num_threads(2)
    k, v = (torch.randn(1, HEADS, TOKENS, HEAD_DIM) for _ in range(2))
    q = torch.randn(1, HEADS, 1, HEAD_DIM)
    rows = []
    for name, mask in PROGRAMS.items():
        attend, position = cd.compile(mask), itertools.count(TOKENS - 20_000)
        spans = mask.keys_of(TOKENS - 1, TOKENS) or ()
        seen = sum(len(span) for span in spans)
        seen_k, seen_v = (torch.cat([x[:, :, span.start : span.stop] for span in spans], dim=2) for x in (k, v))

        def ours(attend=attend, position=position) -> None:  # type: ignore[no-untyped-def]
            for _ in range(CALLS):
                attend(q, k, v, q_offset=next(position))

        def theirs(seen_k=seen_k, seen_v=seen_v) -> None:  # type: ignore[no-untyped-def]
            for _ in range(CALLS):
                torch.nn.functional.scaled_dot_product_attention(q, seen_k, seen_v)

        with torch.no_grad():
            times = measure.interleaved({"ours": ours, "sdpa": theirs}, repeats=15)
        each = {key: measure.median(seconds) / CALLS * 1e6 for key, seconds in times.items()}
        ratio = each["ours"] / each["sdpa"]
        rows.append(
            {"mask": name, "keys seen": seen, "us": each["ours"], "SDPA us": each["sdpa"], "ratio": ratio, "ok": ratio <= MOST}
        )
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if target:
        measure.write_json(target, {"hardware": measure.hardware(), "tokens": TOKENS, "rows": rows})
    raise SystemExit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
