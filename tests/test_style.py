"""How the sources read: docstrings, names, density, lengths."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("compiled_dilated", "passes")
MOST_WORDS = 12  # of a docstring's first line
MOST_LINES_OF_CODE = 45  # of a function, without its docstring and signature
MOST_LINES_OF_FILE = 420
# Names that say nothing about what they name.
VAGUE = frozenset(
    {
        *("each", "found", "made", "given", "mine", "wanted", "known", "kept", "theirs", "ours"),
        *("one", "others", "rest", "got", "said", "asked"),
    }
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = Function | ast.ClassDef | ast.Module
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@dataclass
class Source:
    """One file: its tree, and counts of its lines."""

    path: Path
    text: str
    tree: ast.Module
    comments: int

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))

    @property
    def documented(self) -> Iterator[Documented]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Documented))

    def count(self, kind: Any) -> int:
        return sum(isinstance(node, kind) for node in ast.walk(self.tree))

    def where(self, node: ast.AST) -> str:
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


@cache
def sources(package: str) -> list[Source]:
    """All files of a package."""
    out = []
    for path in sorted((ROOT / package).rglob("*.py")):
        text = path.read_text()
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = sum(token.type == tokenize.COMMENT for token in tokens)
        out.append(Source(path, text, ast.parse(text), comments))
    assert out
    return out


def code_lines(source: Source) -> int:
    """Lines with code: neither blank, nor comments, nor docstrings."""
    documentation: set[int] = set()
    for node in source.documented:
        if ast.get_docstring(node) is not None:
            documentation.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    count = 0
    for number, line in enumerate(source.text.split("\n"), start=1):
        is_code = line.strip() and not line.strip().startswith("#")
        count += bool(is_code and number not in documentation)
    return count


@pytest.mark.parametrize("package", PACKAGES)
def test_first_lines_of_docstrings_are_short(package: str) -> None:
    long = []
    for source in sources(package):
        for node in source.documented:
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if len(first.split()) > MOST_WORDS:
                long.append(f"{source.where(node)}: {first}")
    assert not long, "\n".join(long)


@pytest.mark.parametrize("package", PACKAGES)
def test_names_say_what_they_name(package: str) -> None:
    vague = []
    for source in sources(package):
        for node in ast.walk(source.tree):
            name = ""
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.arg):
                name = node.arg
            if name in VAGUE:
                vague.append(f"{source.where(node)}: {name}")
    assert not vague, "\n".join(vague)


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_and_files_are_short(package: str) -> None:
    long = []
    for source in sources(package):
        if source.lines > MOST_LINES_OF_FILE:
            long.append(f"{source.where(source.tree)}: {source.lines} lines")
        for node in source.functions:
            body = node.body[ast.get_docstring(node) is not None :]
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > MOST_LINES_OF_CODE:
                long.append(f"{source.where(node)}: {node.name} has {lines} lines of code")
    assert not long, "\n".join(long)


@pytest.mark.parametrize("package", PACKAGES)
def test_density(package: str) -> None:
    """Statements rather than nested expressions, and comments at steps."""
    files = sources(package)
    lines = sum(source.lines for source in files)
    conditional = sum(source.count(ast.IfExp) for source in files)
    comprehensions = sum(source.count(Comprehension) for source in files)
    comments = sum(source.comments for source in files)
    code = sum(code_lines(source) for source in files)
    assert conditional <= 12 * lines / 1000
    assert comprehensions <= 25 * lines / 1000
    assert comments >= 4 * code / 100
