"""Docstrings as Markdown for mkdocs: arguments as a list, doctests as code.

A line `name: text` that begins a line of a docstring starts an item; `>>>` starts a block of code up to the next empty line.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ARGUMENT = re.compile(r"^(\w+(?:, \w+)*): ")


def markdown(text: str) -> str:
    """The docstring with Markdown's own marks for lists and code."""
    lines: list[str] = []
    in_code = in_list = False
    for line in text.splitlines():
        if line.startswith(">>>") and not in_code:
            lines += ["", "```python"]
            in_code, in_list = True, False
        elif not line.strip():
            if in_code:
                lines.append("```")
            in_code = in_list = False
        elif not in_code and (argument := _ARGUMENT.match(line)):
            if not in_list:
                lines.append("")
            lines.append(f"- **{argument[1]}**: {line[argument.end() :]}")
            in_list = True
            continue
        # The next lines of an argument's text belong to its item.
        lines.append(f"  {line}" if in_list and line.strip() else line)
    if in_code:
        lines.append("```")
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrite every docstring when it is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
