"""Kernels compiled to machine code of sm_90.

ptxas reports their shared memory, registers and spills.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch._inductor.codecache import PyCodeCache

from . import pretended
from .project import cd

from compiled_dilated import masks  # isort: skip

_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel.

    shared: bytes of shared memory.
    spilled: bytes of spill stores and loads.
    """

    shared: int
    spilled: int
    registers: int
    ptx: str

    @property
    def report(self) -> dict[str, int]:
        """Its numbers, with the number of instructions of tensor cores."""
        wgmma = self.ptx.count("wgmma.mma_async")
        return {
            "shared": self.shared,
            "spilled": self.spilled,
            "registers": self.registers,
            "wgmma": wgmma,
        }


def compiled(
    function: Any,
    signature: dict[str, str],
    constants: dict[Any, Any],
    attributes: Any,
    **options: Any,
) -> Cubin:
    """A Triton function as machine code of the pretended GPU.

    options: num_warps, num_stages.
    """
    source = triton.compiler.ASTSource(function, signature, constants, attributes)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        kernel = triton.compile(source, target=pretended.TARGET, options=options)
    spills, registers = _SPILLS.search(log.getvalue()), _REGISTERS.search(log.getvalue())
    if spills is None or registers is None:
        raise RuntimeError(f"ptxas reports no spills or registers: {log.getvalue()!r}")
    return Cubin(
        kernel.metadata.shared, sum(map(int, spills.groups())), int(registers[1]), kernel.asm["ptx"]
    )


def of_inductor(name: str, source: str) -> Cubin:
    """A kernel from its source by inductor, in its first configuration."""
    kernel = getattr(PyCodeCache.load(source), name)
    config, meta = kernel.configs[0], kernel.triton_meta
    constants = {**meta.get("constants", {}), **config.kwargs}
    names = kernel.fn.arg_names
    signature = {**meta["signature"], **{key: "constexpr" for key in constants if key in names}}
    places = {(names.index(key),): value for key, value in constants.items()}
    attributes = meta["configs"][0] if meta.get("configs") else None
    return compiled(
        kernel.fn,
        signature,
        places,
        attributes,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def flex(dtype: torch.dtype, head_dim: int, backward: bool = True) -> dict[str, Cubin]:
    """FlexAttention's kernels for a window: forward, and backward."""
    pretended.KERNELS.clear()
    x = [torch.zeros(1, 2, 1024, head_dim, dtype=dtype, requires_grad=backward) for _ in range(3)]
    out = cd.compile(masks.window(256), lowering="flex")(*x)
    if backward:
        torch.autograd.grad(out.sum(), x)
    cubins = {}
    for name, source in pretended.KERNELS:
        if "_tem_" in name:
            kind = "backward" if "backward" in name else "forward"
            cubins[kind] = of_inductor(name, source)
    return cubins


def graph(dtype: torch.dtype, head_dim: int) -> dict[str, Cubin]:
    """The kernels of lanes in the code of a compiled graph.

    They are the forward's, and both of the backward.

    Raises AssertionError where the graph calls the operator instead.
    """
    pretended.KERNELS.clear()
    torch._dynamo.reset()
    x = [torch.zeros(1, 2, 512, head_dim, dtype=dtype, requires_grad=True) for _ in range(3)]
    attend = cd.compile(cd.longnet((128, 256), (1, 2)), lowering="lanes")
    out = torch.compile(attend, fullgraph=True)(*x)
    torch.autograd.grad(out.sum(), x)
    cubins = {}
    for kind in ("forward", "grad_queries", "grad_keys"):
        sources = [x for x in pretended.KERNELS if x[0] == kind]
        assert len(sources) == 1, f"the graphs hold {len(sources)} kernels {kind}, not one"
        cubins[kind] = of_inductor(*sources[0])
    return cubins


_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_OF_LSE, _OF_LISTS = ("LSE", "DELTA"), ("TILES", "RUNS", "CLASSES", "BAD")


def lanes(dtype: torch.dtype, head_dim: int) -> dict[str, Cubin]:
    """The kernels of the lowering `lanes`, as it launches them."""
    from compiled_dilated.lowerings.lanes import blocks, kernels

    width = blocks.padded(head_dim)
    forward = blocks.forward_blocks(width, dtype.itemsize)
    backward = blocks.backward_blocks(width, dtype.itemsize)
    sizes = dtype, head_dim, width
    return {
        "forward": _of_lanes(kernels.forward, *sizes, forward, CUT=False),
        "forward of any length": _of_lanes(kernels.forward, *sizes, forward, CUT=True),
        "grad_queries": _of_lanes(kernels.grad_queries, *sizes, backward),
        "grad_keys": _of_lanes(kernels.grad_keys, *sizes, backward),
    }


def _of_lanes(
    function: Any, dtype: torch.dtype, head_dim: int, width: int, blocks: Any, **more: bool
) -> Cubin:
    """A kernel of lanes for keys and values of one width.

    more: constants of this kernel alone.
    """
    constants = {
        "D": head_dim,
        "DV": head_dim,
        "BLOCK_D": width,
        "BLOCK_V": width,
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        **more,
    }
    names = function.arg_names
    signature = {name: _kind(name, dtype) for name in names} | dict.fromkeys(constants, "constexpr")
    places = {(names.index(name),): value for name, value in constants.items()}
    # Multiples of 16: addresses that torch allocates, and strides of usual widths.
    divisible = []
    for name in names:
        is_stride = len(name) == 2 and name not in ("lb", "lh")
        if is_stride or signature[name].startswith("*"):
            divisible.append(name)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    return compiled(
        function, signature, places, attributes, num_warps=blocks.warps, num_stages=blocks.stages
    )


def _kind(name: str, dtype: torch.dtype) -> str:
    """The type of a kernel's argument by its name."""
    if name in _OF_LSE:
        return "*fp32"
    if name in _OF_LISTS:
        return "*i32"
    if name in ("scale", "factor"):
        return "fp32"
    return _TYPES[dtype] if name.isupper() else "i32"


triton.knobs.nvidia.dump_ptxas_log = True
triton.knobs.compilation.always_compile = True
