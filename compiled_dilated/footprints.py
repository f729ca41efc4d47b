"""Peak bytes of a call, and the largest shapes within a limit.

Values only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Beyond tensors and workspaces: pages that allocators round up, arenas of threads, Python objects.
ROUNDING = 2 * 2**20


@dataclass(frozen=True)
class Footprint:
    """Bytes of a call at its peak, by tensor.

    Not counted: Python and torch themselves, and the data tensors that masks read.

    inputs: q, k and v.
    output: out.
    lse: the log-sum-exps.
    gradients: of out, q, k and v; 0 without a backward.
    workspace: an upper bound of what kernels and copies of rows allocate, with ROUNDING.
    """

    inputs: int
    output: int
    lse: int
    gradients: int
    workspace: int

    @property
    def total(self) -> int:
        """All bytes together."""
        return self.inputs + self.output + self.lse + self.gradients + self.workspace

    def to_json(self) -> dict[str, int]:
        """The fields and their total."""
        return {**asdict(self), "total": self.total}

    def __str__(self) -> str:
        parts = [
            ("q, k and v", self.inputs),
            ("out", self.output),
            ("lse", self.lse),
            ("gradients", self.gradients),
            ("workspace", self.workspace),
        ]
        named = [f"{name} {mib(size)}" for name, size in parts if size]
        return f"{mib(self.total)} MiB ({', '.join(named)})"


@dataclass(frozen=True)
class Fit:
    """The largest batch and the longest sequence within a memory limit.

    limit: bytes.
    batch: the largest batch at the length of the plan.
    batch_bytes: peak of that batch.
    tokens: the longest sequence at the batch of the plan; 0 if no length fits, None if queries
        and keys are not one sequence.
    tokens_bytes: peak of that sequence.
    tokens_end: what ends it: "memory"; "program", if it has no length of one token more, as with
        a grid; or "search", at 2**30 tokens, the longest sequence that is tried.
    """

    limit: int
    batch: int
    batch_bytes: int
    tokens: int | None
    tokens_bytes: int
    tokens_end: str

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    def lines(self, batch: int, tokens: int) -> list[str]:
        """Lines of `explain` for a plan of this batch and length."""
        lines = [
            f"limit     {mib(self.limit)} MiB: at most {self.batch:,} batch rows of "
            f"{tokens:,} tokens ({mib(self.batch_bytes)} MiB)"
        ]
        if self.tokens is None:
            return lines
        rows = f"{batch:,} batch row{'s' * (batch != 1)}"
        if self.tokens == 0:
            return [*lines, f"          {rows} fit at no length of this program"]
        why = {
            "memory": "",
            "program": ", where the program ends",
            "search": ", the longest sequence that is tried",
        }
        return [
            *lines,
            f"          {rows} of at most {self.tokens:,} tokens ({mib(self.tokens_bytes)} MiB)"
            f"{why[self.tokens_end]}",
        ]


def mib(size: int) -> str:
    """Bytes as MiB, without the unit."""
    return f"{size / 2**20:,.1f}"
