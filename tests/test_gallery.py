"""The pages of docs/ about masks are what the code does."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from compiled_dilated import masks
from compiled_dilated.text import NAMES

ROOT = Path(__file__).resolve().parents[1]


def test_the_gallery_is_what_the_code_draws() -> None:
    gallery = runpy.run_path(str(ROOT / "tools" / "gallery"))
    assert (ROOT / "docs" / "masks.md").read_text(encoding="utf-8") == gallery["page"](), (
        "run tools/gallery"
    )


def test_the_gallery_has_every_mask() -> None:
    headings = " ".join(
        re.findall(
            r"^## (.*)$", (ROOT / "docs" / "masks.md").read_text(encoding="utf-8"), re.MULTILINE
        )
    )
    makers = {name for name in masks.__all__ if name in NAMES and name.islower()} | {
        "from_mod",
        "big_bird",
        "longnet",
    }
    assert {name for name in makers if f"{name}(" not in headings} == set()


def test_coming_from_another_library() -> None:
    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "coming-from.md", "exec"), names)
    with pytest.raises(AssertionError):  # the comparison can fail
        names["same"](
            masks.window(7, 0), (names["q"] >= names["kv"]) & (names["q"] - names["kv"] < 7)
        )
