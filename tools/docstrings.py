"""Docstrings as Markdown for mkdocs: arguments as a list, doctests as code.

A line of the form `name: text` starts an item of a list, `>>>` a block of code up to the next
empty line.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ARGUMENT = re.compile(r"^(\w+(?:, \w+)*): ")


def markdown(text: str) -> str:
    """A docstring with Markdown's marks for lists and code."""
    lines: list[str] = []
    in_code = in_list = False
    for line in text.splitlines():
        argument = None if in_code else _ARGUMENT.match(line)
        if argument:
            # Markdown needs an empty line before a list.
            if not in_list:
                lines.append("")
            lines.append(f"- **{argument[1]}**: {line[argument.end() :]}")
            in_list = True
            continue
        if line.startswith(">>>") and not in_code:
            lines += ["", "```python"]
            in_code, in_list = True, False
        elif not line.strip():
            # An empty line ends a block of code, and a list.
            if in_code:
                lines.append("```")
            in_code = in_list = False
        # Further lines of an argument's text belong to its item.
        if in_list and line.strip():
            line = f"  {line}"
        lines.append(line)
    if in_code:
        lines.append("```")
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Extension of griffe that rewrites every docstring."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
