"""Rates of kernels, and the price of bytes and calls, per kind of device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Constants of a kind of device. Rates are shares of its dense kernel's.

    flops_per_byte: flops of a dense kernel in the time to copy one byte.
    flops_per_call: flops of a dense kernel in the time to launch one kernel.
    tiles: rate of the kernel that runs batches of tiles.
    flex, flex_float32: rate of FlexAttention on the tiles that it visits.
    lanes_full, lanes_partial: rate of the kernel of lanes on FULL and on PARTIAL blocks.
    measured: whether these were measured on such a device; else they are estimates.
    """

    flops_per_byte: float
    flops_per_call: float
    tiles: float
    flex: float
    flex_float32: float
    lanes_full: float
    lanes_partial: float
    measured: bool


# Two CPU cores: windows of 256 of 16K tokens for FlexAttention, benchmarks/kernels.py for tiles.
CPU = Constants(10.0, 4e6, 1.0, 0.7, 0.7, 1.0, 1.0, measured=True)
# H100 and H200: no measurement. Public rates of dense kernels at 2K rows (a figure of the
# FlashAttention-3 paper: Triton 389, cuDNN 617 TF/s), about 150 for memory-efficient attention,
# and 20 to 100 us of host time for a call.
HOPPER = Constants(230.0, 1e10, 0.3, 0.6, 0.1, 0.8, 0.6, measured=False)


def constants(device: str) -> Constants:
    """Constants of a device type; all but a CPU have those of a GPU."""
    return CPU if device == "cpu" else HOPPER
