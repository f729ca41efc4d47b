"""Coverage by the emulation of lines that only a GPU takes.

    recorded()   in a process: the lines of compiled_dilated that run, written as it ends
    of_gpu()     lines of the sources that only a GPU takes, by file and function
    unreached()  those that no process ran, as names that survive edits elsewhere

Lines that only a GPU takes are those of whole modules and classes (`_WHOLE`), and the side of a
device of every `if` that compares one with "cpu" or "cuda".
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "compiled_dilated"
# Processes write their lines into this folder, if it is named.
FOLDER = "EMULATION_LINES"
# Sources and classes that nothing but a GPU runs; kernels are run by the interpreter from a copy.
_WHOLE = {
    "lowerings/lanes/running.py": None,
    "lowerings/tiling/kernels.py": ("EfficientCUDA",),
    "packages/about.py": ("gpu_isa", "_check_gpu"),
    "native/cpp.py": ("write_checks",),
}
_DEVICES = ("cpu", "cuda")

Lines = dict[str, set[int]]


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Record the lines of compiled_dilated that run, if `FOLDER` is named."""
    folder = os.environ.get(FOLDER)
    if not folder:
        yield
        return
    ran: Lines = {}
    prefix = f"{PACKAGE}{os.sep}"

    def of_frame(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            ran.setdefault(frame.f_code.co_filename, set()).add(frame.f_lineno)
        return of_frame

    def of_call(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(prefix):
            return None
        ran.setdefault(name, set()).add(frame.f_lineno)
        return of_frame

    # Threads that start from here on, and this one.
    threading.settrace(of_call)
    sys.settrace(of_call)
    try:
        yield
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
            json.dump({name: sorted(numbers) for name, numbers in ran.items()}, file)


def read(folder: Path) -> Lines:
    """The lines that any process has run, by path in the package."""
    ran: Lines = {}
    for file in folder.glob("*.json"):
        for name, numbers in json.loads(file.read_text()).items():
            ran.setdefault(str(Path(name).relative_to(PACKAGE)), set()).update(numbers)
    return ran


def of_gpu() -> dict[str, dict[int, str]]:
    """Lines that only a GPU takes: their function by number, by path in the package."""
    found: dict[str, dict[int, str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name, tree = str(path.relative_to(PACKAGE)), ast.parse(path.read_text())
        visitor = _Visitor(name)
        visitor.visit(tree)
        if visitor.lines:
            found[name] = visitor.lines
    return found


def unreached(ran: Mapping[str, set[int]]) -> tuple[list[str], int]:
    """Lines of a GPU that did not run, as "path: function: text", and the number of all."""
    missing, total = [], 0
    for name, lines in of_gpu().items():
        text = (PACKAGE / name).read_text().splitlines()
        total += len(lines)
        for number, function in sorted(lines.items()):
            if number not in ran.get(name, ()):
                missing.append(f"{name}: {function}: {text[number - 1].strip()}")
    return missing, total


class _Visitor(ast.NodeVisitor):
    """Collects lines that only a GPU takes, with the function that has them."""

    def __init__(self, name: str) -> None:
        self.lines: dict[int, str] = {}
        self._whole = _WHOLE.get(name, ())
        self._within: list[str] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._within.append(node.name)
        if self._whole is None or set(self._within) & set(self._whole):
            self._add(node.body)
        self._statements(node.body)
        self.generic_visit(node)
        self._within.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._within.append(node.name)
        self.generic_visit(node)
        self._within.pop()

    def visit_If(self, node: ast.If) -> None:
        self._statements(node.body)
        self._statements(node.orelse)
        self.generic_visit(node)

    def _statements(self, statements: list[ast.stmt]) -> None:
        """The side of a GPU of every `if` about a device."""
        for number, node in enumerate(statements):
            if not isinstance(node, ast.If):
                continue
            side = _side(node.test)
            if side is True:
                self._add(node.body)
            elif side is False and node.orelse:
                self._add(node.orelse)
            elif side is False and isinstance(node.body[-1], (ast.Return, ast.Raise)):
                # What follows a return for the CPU.
                self._add(statements[number + 1 :])

    def _add(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a docstring
            for node in ast.walk(statement):
                if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.Pass)):
                    self.lines[node.lineno] = ".".join(self._within) or "module"


def _side(test: ast.expr) -> bool | None:
    """True of a test that needs a GPU, False of one that a GPU alone fails, else None.

    A GPU fails "a or CPU" alone, and needs "a and GPU"; other tests about devices say neither.
    """
    if not isinstance(test, ast.BoolOp):
        return _compared(test)
    decisive = isinstance(test.op, ast.And)
    sides = [_compared(part) for part in test.values]
    return decisive if decisive in sides else None


def _compared(test: ast.expr) -> bool | None:
    """As `_side`, of a single comparison or property."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        side = _compared(test.operand)
        return None if side is None else not side
    text = ast.unparse(test)
    if text.endswith((".is_of_gpu", ".is_cuda")) or text.startswith("gives_lse("):
        return True
    if text.endswith("._is_on_cpu") or text.startswith("_is_on_cpu("):
        return False
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        return None
    right = test.comparators[0]
    if not isinstance(right, ast.Constant) or right.value not in _DEVICES:
        return None
    if "device" not in ast.unparse(test.left):
        return None
    is_equal = isinstance(test.ops[0], ast.Eq)
    return is_equal is (right.value == "cuda")
