"""Rates of this library's kernels and of dense attention on a CPU, for estimates of time."""

from __future__ import annotations

# Flops a second, of a forward, and of a forward with its backward, whose products are two and a half times the forward's.
# Two cores of a virtual machine with AVX-512 and AMX, 8 heads of 64; medians of FILES.
FORWARD_AND_BACKWARD = 3.5
_DENSE = {"float32": (212e9, 214e9), "bfloat16": (637e9, 318e9)}
_NATIVE = {"float32": (222e9, 217e9), "bfloat16": (662e9, 489e9), "float16": (165e9, 165e9)}
MACHINE = "two cores with AVX-512 and AMX"
FILES = "benchmarks/results/attention-cpu-2026-11-28.json, attention-more-cpu-2026-11-28.json"


def seconds(
    lowering: str, dtype: str, device: str, dense_flops: float, training: bool
) -> float | None:
    """Expected time of a forward, or of a forward and backward; None where no rate was measured.

    dense_flops: what a dense kernel would compute in the time of a forward.
    """
    rates = (_NATIVE if lowering == "native" else _DENSE).get(dtype)
    if device != "cpu" or rates is None:
        return None
    return dense_flops * FORWARD_AND_BACKWARD / rates[1] if training else dense_flops / rates[0]
