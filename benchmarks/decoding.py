"""Measure decoding: one query against a cache of 64K tokens.

Its rival is SDPA over only the keys that the query sees.

python benchmarks/decoding.py [--json FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import compiled_dilated as cd
from compiled_dilated import masks, measure
from compiled_dilated.masks import Mask

TOKENS, HEADS, HEAD_DIM, CALLS, MOST = 65536, 8, 64, 50, 1.3
PROGRAMS = {
    "causal": masks.causal(),
    "window 256": masks.causal() & masks.window(256),
    "window 1024 | sinks 4": masks.causal() & (masks.window(1024) | masks.sinks(4)),
    "segments 2048": masks.causal() & masks.segments(2048),
}


def rows_of(x: Tensor, spans: tuple[range, ...]) -> Tensor:
    """Rows of a cache in ranges; of several ranges, a copy.

    x: (B, H, M, D).
    """
    parts = []
    for span in spans:
        parts.append(x[:, :, span.start : span.stop])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def row(name: str, mask: Mask, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """Measure the last positions of the cache, one after the other."""
    attend, positions = cd.compile(mask), range(TOKENS - CALLS, TOKENS)
    # Computed before the measurement: SDPA's time contains no search for keys.
    spans = {position: mask.keys_of(position, TOKENS) or () for position in positions}

    def by_program() -> None:
        for position in positions:
            attend(q, k, v, q_offset=position)

    def by_sdpa() -> None:
        for position in positions:
            keys, values = rows_of(k, spans[position]), rows_of(v, spans[position])
            scaled_dot_product_attention(q, keys, values)

    functions = {"ours": by_program, "sdpa": by_sdpa}
    with torch.no_grad():
        times = measure.interleaved(functions, repeats=61, seconds=15.0)
    seconds = measure.medians(times)
    ratio = seconds["ours"] / seconds["sdpa"]
    return {
        "mask": name,
        "keys seen": sum(map(len, spans[TOKENS - 1])),
        "us": seconds["ours"] / CALLS * 1e6,
        "SDPA us": seconds["sdpa"] / CALLS * 1e6,
        "ratio": ratio,
        "ok": ratio <= MOST,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", type=Path, help="where to write the figures")
    target = arguments.parse_args().json
    torch.set_num_threads(2)
    k, v = (torch.randn(1, HEADS, TOKENS, HEAD_DIM) for _ in range(2))
    q = torch.randn(1, HEADS, 1, HEAD_DIM)
    rows = [row(name, mask, q, k, v) for name, mask in PROGRAMS.items()]
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if target:
        measure.write_json(target, {"hardware": measure.hardware(), "tokens": TOKENS, "rows": rows})
    raise SystemExit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
