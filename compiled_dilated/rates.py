"""Measured rates of kernels on a CPU, for estimates of time."""

from __future__ import annotations

# Matrix products of a backward per product of a forward: five to two.
BACKWARD = 2.5
FORWARD_AND_BACKWARD = 1 + BACKWARD
# Flops per second of a forward, and of a forward with its backward. Two cores of a virtual machine
# with AVX-512 and AMX, 8 heads of 64; medians of FILES.
_DENSE = {"float32": (212e9, 214e9), "bfloat16": (637e9, 318e9)}
_NATIVE = {"float32": (222e9, 217e9), "bfloat16": (662e9, 489e9), "float16": (165e9, 165e9)}
MACHINE = "two cores with AVX-512 and AMX"
FILES = "benchmarks/results/attention-cpu-2026-11-28.json, attention-more-cpu-2026-11-28.json"


def seconds(
    lowering: str, dtype: str, device: str, dense_flops: float, training: bool
) -> float | None:
    """Estimated seconds of a forward, or a training step; None if unmeasured.

    dense_flops: flops of a dense kernel in the time of a forward.
    """
    table = _NATIVE if lowering == "native" else _DENSE
    if device != "cpu" or dtype not in table:
        return None
    forward_rate, training_rate = table[dtype]
    if training:
        return dense_flops * FORWARD_AND_BACKWARD / training_rate
    return dense_flops / forward_rate
