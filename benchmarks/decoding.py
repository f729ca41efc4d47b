"""Measure decoding: one query per head against a cache.

Its rival is SDPA over only the keys that the query sees.

python benchmarks/decoding.py [--json FILE]

Programs are measured over 65,536 keys of 8 heads in float32. The shapes of models are measured
without a program: query heads that share key heads, other lengths and bfloat16. Exit code 1 if a
case takes longer than 1.3 times SDPA's time, or differs from SDPA in float64. Needs a quiet machine
for two minutes.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness.problems import TOLERANCES
from harness.runs import origin
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import compiled_dilated as cd
from compiled_dilated import measure
from compiled_dilated.text import read_program

CALLS, MOST = 50, 1.3


@dataclass(frozen=True)
class Case:
    """One query per head of a model.

    program: an expression of one branch.
    tokens: keys of the cache.
    """

    program: str
    tokens: int = 65536
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        generator, dtype = torch.Generator().manual_seed(0), getattr(torch, self.dtype)
        q = torch.randn(1, self.heads, 1, self.head_dim, generator=generator)
        size = (1, self.kv_heads, self.tokens, self.head_dim)
        k, v = (torch.randn(size, generator=generator) for _ in range(2))
        return q.to(dtype), k.to(dtype), v.to(dtype)


PROGRAMS = (
    "causal()",
    "causal() & window(256)",
    "causal() & (window(1024) | sinks(4))",
    "causal() & segments(2048)",
)


def cases() -> list[Case]:
    """Programs over one shape, then shapes of models."""
    out = [Case(program) for program in PROGRAMS]
    for dtype in ("float32", "bfloat16"):
        out.append(Case("causal()", 4096, dtype=dtype))
        for tokens in (4096, 16384):
            out.append(Case("causal()", tokens, 8, 4, 64, dtype))
            out.append(Case("causal()", tokens, 32, 8, 128, dtype))
    return out


def rows_of(x: Tensor, spans: tuple[range, ...]) -> Tensor:
    """Rows of a cache in ranges; of several ranges, a copy.

    x: (B, H, M, D).
    """
    parts = []
    for span in spans:
        parts.append(x[:, :, span.start : span.stop])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def row(case: Case) -> dict[str, Any]:
    """Measure the last positions of the cache, one after the other."""
    (branch,) = read_program(case.program).branches
    attend, positions = cd.compile(branch.mask), range(case.tokens - CALLS, case.tokens)
    q, k, v = case.inputs()
    # Computed before the measurement: SDPA's time contains no search for keys.
    spans = {position: branch.mask.keys_of(position, case.tokens) or () for position in positions}
    is_grouped = case.heads != case.kv_heads

    def by_program() -> None:
        for position in positions:
            attend(q, k, v, q_offset=position)

    def by_sdpa() -> None:
        for position in positions:
            keys, values = rows_of(k, spans[position]), rows_of(v, spans[position])
            scaled_dot_product_attention(q, keys, values, enable_gqa=is_grouped)

    functions = {"ours": by_program, "sdpa": by_sdpa}
    last = positions[-1]
    with torch.no_grad():
        expected = scaled_dot_product_attention(
            q.double(),
            rows_of(k, spans[last]).double(),
            rows_of(v, spans[last]).double(),
            enable_gqa=is_grouped,
        )
        error = (attend(q, k, v, q_offset=last) - expected).abs().max() / expected.abs().max()
        times = measure.interleaved(functions, repeats=61, seconds=15.0)
    seconds = measure.medians(times)
    ratio = seconds["ours"] / seconds["sdpa"]
    figures = {
        "keys seen": sum(map(len, spans[case.tokens - 1])),
        "us": seconds["ours"] / CALLS * 1e6,
        "SDPA us": seconds["sdpa"] / CALLS * 1e6,
    }
    is_right = error.item() <= TOLERANCES[case.dtype]
    figures |= {"ratio": ratio, "error": error.item(), "ok": ratio <= MOST and is_right}
    return asdict(case) | figures


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--json", type=Path, help="where to write the figures")
    target = arguments.parse_args().json
    torch.set_num_threads(2)
    rows = [row(case) for case in cases()]
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if target:
        measure.write_json(target, origin() | {"rows": rows})
    raise SystemExit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
