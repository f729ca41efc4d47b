"""Names of jobs, without torch: "run: CASE" and "compile: WAY DTYPE HEAD_DIM".

Also "package: CASE" and "device: CASE". WAY is a function of `cubins`; cases are those of `cases`,
`packages` and `devices`.
"""

from __future__ import annotations

import ast
from pathlib import Path

RUN, COMPILE, PACKAGE, DEVICE = "run", "compile", "package", "device"
# The values of EMULATION in the processes of jobs.
MODES = {RUN: "interpret", COMPILE: "compile", PACKAGE: "package", DEVICE: "package"}
# Modules with cases.
MODULES = {RUN: "cases", PACKAGE: "packages", DEVICE: "devices"}
_WIDTHS = {"bfloat16": (64, 96, 128, 256), "float16": (64, 96, 128, 256), "float32": (64, 96, 128)}
_GRAPHS = ("graph bfloat16 64", "graph float16 128")
# A graph compiles the kernels of lanes.
_SHORT_COMPILED = ("flex bfloat16 64", "graph bfloat16 64")


def names(short: bool) -> list[str]:
    """All jobs, or those of the short half."""
    out = []
    for kind, module in MODULES.items():
        for name, is_short in _cases(module).items():
            if is_short or not short:
                out.append(f"{kind}: {name}")
    compiled = list(_GRAPHS)
    for dtype, widths in _WIDTHS.items():
        for width in widths:
            compiled += [f"flex {dtype} {width}", f"lanes {dtype} {width}"]
    for name in compiled:
        if name in _SHORT_COMPILED or not short:
            out.append(f"{COMPILE}: {name}")
    return out


def batches(chosen: list[str], at_once: int = 4) -> list[list[str]]:
    """Batches of jobs for one process: few, and of one kind."""
    out = []
    for kind in (COMPILE, PACKAGE, DEVICE, RUN):
        # The interpreter changes Triton's library, after which a process compiles no kernel.
        most = 1 if kind == PACKAGE else at_once
        alike = [name for name in chosen if name.startswith(kind)]
        out += [alike[start : start + most] for start in range(0, len(alike), most)]
    return out


def mode_of(name: str) -> str:
    """The mode of the emulation that a job needs."""
    return MODES[name.partition(":")[0]]


def _cases(module: str) -> dict[str, bool]:
    """Names of cases, and whether they are of the short half.

    Read from their source, since an import needs torch.
    """
    table = _annotated("CASES", (Path(__file__).parent / f"{module}.py").read_text())
    assert isinstance(table, ast.Dict)
    out = {}
    for key, value in zip(table.keys, table.values, strict=True):
        assert isinstance(key, ast.Constant)
        assert isinstance(value, ast.Call)
        out[key.value] = any(option.arg == "short" for option in value.keywords)
    return out


def _annotated(name: str, source: str) -> ast.expr | None:
    """The value of an annotated assignment in a source; None without one."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            return node.value
    return None
