"""What a planner assumes of a kind of device: rates as shares of its dense kernel's, and the price of bytes and calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Constants of a kind of device.

    flops_per_byte, flops_per_call: flops that a dense kernel does while one byte is copied, or while a kernel call is set up.
    tiles: rate of the kernel that runs batches of tiles. flex, flex_float32: of FlexAttention on the tiles that it visits.
    lanes_full, lanes_partial: of the kernel of lanes on FULL and on PARTIAL blocks.
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
# H100 and H200: no measurement. Public rates of dense kernels at 2K rows (FlashAttention-3's figure: Triton 389, cuDNN 617 TF/s),
# about 150 for memory-efficient attention, 20 to 100 us of host for a call.
HOPPER = Constants(230.0, 1e10, 0.3, 0.6, 0.1, 0.8, 0.6, measured=False)


def constants(device: str) -> Constants:
    """The constants of a device type; those of a GPU for every device that is no CPU."""
    return CPU if device == "cpu" else HOPPER
