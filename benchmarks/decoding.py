"""One query against a cache of 64K tokens, against SDPA over just the keys that it sees, taken from the same cache.

python benchmarks/decoding.py [--json FILE]
"""

from __future__ import annotations

import argparse
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


def taken(x: torch.Tensor, spans: tuple[range, ...]) -> torch.Tensor:
    """The rows of a cache (B, H, M, D) in some ranges: a view of one range, a copy of several."""
    parts = [x[:, :, span.start : span.stop] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", type=Path, help="where to write the figures")
    target = arguments.parse_args().json
    torch.set_num_threads(2)
    k, v = (torch.randn(1, HEADS, TOKENS, HEAD_DIM) for _ in range(2))
    q = torch.randn(1, HEADS, 1, HEAD_DIM)
    rows = []
    for name, mask in PROGRAMS.items():
        attend, positions = cd.compile(mask), range(TOKENS - CALLS, TOKENS)
        spans = {at: mask.keys_of(at, TOKENS) or () for at in positions}

        def ours(attend=attend, positions=positions) -> None:  # type: ignore[no-untyped-def]
            for at in positions:
                attend(q, k, v, q_offset=at)

        def theirs(spans=spans, positions=positions) -> None:  # type: ignore[no-untyped-def]
            for at in positions:
                torch.nn.functional.scaled_dot_product_attention(
                    q, taken(k, spans[at]), taken(v, spans[at])
                )

        with torch.no_grad():
            times = measure.interleaved({"ours": ours, "sdpa": theirs}, repeats=61, seconds=15.0)
        each = {key: measure.median(seconds) / CALLS * 1e6 for key, seconds in times.items()}
        ratio = each["ours"] / each["sdpa"]
        seen = sum(map(len, spans[TOKENS - 1]))
        rows.append(
            {
                "mask": name,
                "keys seen": seen,
                "us": each["ours"],
                "SDPA us": each["sdpa"],
                "ratio": ratio,
                "ok": ratio <= MOST,
            }
        )
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if target:
        measure.write_json(target, {"hardware": measure.hardware(), "tokens": TOKENS, "rows": rows})
    raise SystemExit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
