"""docs/masks.md and docs/coming-from.md agree with the code."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from compiled_dilated import masks
from compiled_dilated.text import NAMES

ROOT = Path(__file__).resolve().parents[1]


PAGE = ROOT / "docs" / "masks.md"


def test_the_gallery_is_drawn_by_the_code() -> None:
    gallery = runpy.run_path(str(ROOT / "tools" / "gallery"))
    assert PAGE.read_text(encoding="utf-8") == gallery["page"](), "run tools/gallery"


def test_the_gallery_has_every_mask() -> None:
    headings = " ".join(re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    makers = {name for name in masks.__all__ if name in NAMES and name.islower()}
    makers |= {"from_mod", "big_bird", "longnet"}
    assert {name for name in makers if f"{name}(" not in headings} == set()


def test_masks_of_other_libraries_are_the_same_pairs() -> None:
    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "coming-from.md", "exec"), names)
    # The comparison of the page can fail: a window of 7 keys back is not 6.
    q, kv = names["q"], names["kv"]
    with pytest.raises(AssertionError):
        names["same"](masks.window(7, 0), (q >= kv) & (q - kv < 7))
