"""Constants of kinds of devices that costs are estimated with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Relative rates of kernels, and the cost of bytes and calls.

    Rates are shares of the rate of one large dense call.

    flops_per_byte: flops of a dense kernel in the time that copying a byte takes.
    flops_per_call: flops of a dense kernel in the time in which the host prepares a call.
    tiles: rate of the kernel that runs batches of tiles.
    flex: rate of FlexAttention on the tiles that it visits.
    lanes_full, lanes_partial: rates of lanes on FULL and on PARTIAL blocks.
    flex_float32, lanes_float32: the same in float32; the rate of tiles is `tiles` there too.
    working_set: bytes that a call of the kernel of tiles may take also for small tensors; 0:
        the default of `tiling.costs`, which fits the caches of a CPU.
    measured: whether a program measured all rates on such a device; else they are estimates.
    """

    flops_per_byte: float
    flops_per_call: float
    tiles: float
    flex: float
    lanes_full: float
    lanes_partial: float
    flex_float32: float
    lanes_float32: float
    working_set: int
    measured: bool


# Two cores: flex on windows of 256 of 16K tokens, tiles by benchmarks/kernels.py.
CPU = Constants(
    flops_per_byte=10.0,
    flops_per_call=4e6,
    tiles=1.0,
    flex=0.7,
    lanes_full=1.0,
    lanes_partial=1.0,
    flex_float32=0.7,
    lanes_float32=1.0,
    working_set=0,
    measured=True,
)
# H100 and H200, from published rates of dense kernels at 2K rows (FlashAttention-3: Triton 389,
# cuDNN 617 TFLOP/s; memory-efficient attention about 150) and 20 to 100 us of host for a call.
# `tools/gpu_check` prints the measured ones. The working set is a quarter of an H100's memory.
HOPPER = Constants(
    flops_per_byte=230.0,
    flops_per_call=1e10,
    tiles=0.3,
    flex=0.6,
    lanes_full=0.8,
    lanes_partial=0.6,
    flex_float32=0.1,
    lanes_float32=0.15,
    working_set=20 * 2**30,
    measured=False,
)


def constants(device: str) -> Constants:
    """Constants of a device type.

    Every device except a CPU counts as a Hopper GPU.
    """
    if device == "cpu":
        return CPU
    return HOPPER
