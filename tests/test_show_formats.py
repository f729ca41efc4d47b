"""Pictures of masks as SVG, PNG, text and files."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compiled_dilated as cd
from compiled_dilated import Branch, Program, masks
from compiled_dilated.masks import Mask
from compiled_dilated.pictures.pixels import MOST_PIXELS
from compiled_dilated.pictures.shades import EMPTY, Shades
from tests.support.pictures import Grid, dense


def rasterized(svg: str) -> tuple[Grid, list[str]]:
    """The cells of an SVG's first card, and their colours.

    Cells are numbers of colours.
    """
    group = svg.partition('shape-rendering="crispEdges">')[2].partition("</g>")[0]
    card, *layers = re.findall(r'<path fill="(#\w+)" d="([^"]+)"', group)
    size = re.fullmatch(r"M0 0h(\d+)v(\d+)H0z", card[1])
    assert size is not None
    image = np.zeros((int(size[2]), int(size[1])), dtype=np.int64)
    for number, (_, path) in enumerate(layers, 1):
        rectangles = re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)H(\d+)z", path)
        drawn = ["M{} {}h{}v{}H{}z".format(*rectangle) for rectangle in rectangles]
        assert "".join(drawn) == path
        for rectangle in rectangles:
            x, y, width, height, back = map(int, rectangle)
            assert x == back
            assert not image[y : y + height, x : x + width].any()
            image[y : y + height, x : x + width] = number
    return image, [card[0], *(color for color, _ in layers)]


@pytest.mark.parametrize(
    "program",
    [masks.window(3, 5) & masks.segments(20), cd.longnet((8, 16), (1, 2))],
    ids=["mask", "program"],
)
def test_svg_is_the_dense_mask(program: Program | Mask) -> None:
    figure = cd.show(program, 40, head=0)
    image, colors = rasterized(figure._repr_html_())
    assert (image == dense(program, 8, 40, 40)[0, 0]).all()
    assert colors == figure.shades.palette


def test_png_is_the_dense_mask() -> None:
    from matplotlib.image import imread

    program = cd.longnet((8, 16), (1, 2), causal=True)
    figure = cd.show(program, 32, head=0)
    image = np.rint(imread(io.BytesIO(figure.png()))[..., :3] * 255).astype(int)
    palette = np.array([rgb_of(color) for color in figure.shades.palette])
    distance = abs(image[:, :, None, :] - palette).sum(axis=-1)
    # The picture: rows and columns of the file that are mostly of the palette's colours.
    is_picture = distance.min(axis=-1) == 0
    sides = [np.flatnonzero(is_picture.mean(axis=axis) > 0.5) for axis in (1, 0)]
    # The dots at the middles of its 32 x 32 pixels.
    rows, columns = (np.linspace(side[0], side[-1] + 1, 65)[1::2].astype(int) for side in sides)
    colors = distance[rows][:, columns].argmin(axis=-1)
    assert (colors == dense(program, 8, 32, 32)[0, 0]).all()


def rgb_of(color: str) -> list[int]:
    """The parts of a colour "#rrggbb"."""
    return [int(color[start : start + 2], 16) for start in (1, 3, 5)]


def test_every_pixel_of_a_png_is_more_than_a_dot() -> None:
    from matplotlib.image import imread

    image = imread(io.BytesIO(cd.show(masks.congruent(2, 0), MOST_PIXELS).png()))[..., :3]
    dark = (image.sum(axis=-1) < 1.2).any(axis=1)
    assert np.diff(dark.astype(int)).clip(min=0).sum() >= MOST_PIXELS // 2


def test_colours_say_how_many() -> None:
    shades = Shades(3, is_single=True)
    assert [name for name, _ in shades.legend] == ["0", "1", "2", "3"]
    assert shades.levels(np.array([0.0, 1, 2, 3])).tolist() == [0, 1, 2, 3]
    assert len(set(shades.palette)) == 4
    large = Shades(1, is_single=False)
    levels = large.levels(np.array([0, 1e-9, 0.001, 0.1, 0.5, 1.0]))
    assert levels[0] == 0
    assert levels[1] > 0  # a single pair of a large pixel is visible
    assert (np.diff(levels) >= 0).all()
    assert levels[-1] == len(large.palette) - 1
    # Readable in grey: each shade is darker than the one before it.
    lightness = [np.dot((0.3, 0.59, 0.11), rgb_of(color)) for color in large.palette[1:]]
    assert (np.diff(lightness) < 0).all()
    assert large.palette[0] == EMPTY


def test_text_of_one_mask() -> None:
    lines = str(cd.show(masks.causal(), 4)).splitlines()
    assert lines[0] == "causal()"
    assert lines[1] == "4 tokens; all heads alike; a pixel is one pair"
    assert lines[-3:] == ["10 pairs allowed (62.500% of 16)", "█▄  ", "███▄"]
    lines = cd.show(masks.causal(), 4).text(unicode=False).splitlines()
    assert lines[-4:] == ["#...", "##..", "###.", "####"]


def test_text_counts_branches_by_digits() -> None:
    lines = str(cd.show(Program((Branch(masks.causal()), Branch(masks.window(0)))), 3)).splitlines()
    assert lines[-4:-1] == ["2··", "12·", "112"]


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("n", [100, 3000])
def test_text_fits_a_terminal(columns: int, n: int) -> None:
    text = cd.show(cd.longnet((16, 32), (1, 2)), n).text(columns)
    assert max(map(len, text.splitlines())) <= columns


def test_text_of_many_tokens_is_the_share_of_cells() -> None:
    lines = cd.show(masks.causal(), 2**20).text(unicode=False).splitlines()
    assert len(lines) == 4 + 32 + 2
    assert lines[4].startswith("%%..")
    assert lines[4 + 31] == "##" * 31 + "%%"
    assert "a cell is 32,768 x 32,768 tokens" in " ".join(lines[-2:])


def test_it_is_saved_by_its_ending(tmp_path: Path) -> None:
    figure = cd.show(masks.window(2), 12)
    for ending in ("png", "pdf", "svg", "html", "txt"):
        figure.save(tmp_path / f"mask.{ending}")
    assert (tmp_path / "mask.png").read_bytes() == figure.png() == figure._repr_png_()
    assert (tmp_path / "mask.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "mask.svg").read_text().startswith("<svg")
    assert figure._repr_html_() in (tmp_path / "mask.html").read_text()
    assert (tmp_path / "mask.txt").read_text() == f"{figure}\n"
    message = r"path must end in one of .png, .pdf, .svg, .html, .txt; got 'mask.doc'"
    with pytest.raises(ValueError, match=message):
        figure.save("mask.doc")


def test_without_matplotlib_it_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    figure = cd.show(masks.window(2), 12)
    message = r"needs matplotlib; install it with pip install 'compiled-dilated\[show\]'"
    with pytest.raises(ImportError, match=message):
        figure.save(tmp_path / "mask.png")
    assert not list(tmp_path.iterdir())
    assert figure._repr_png_() is None
    figure.save(tmp_path / "mask.svg")
    assert "<svg" in figure._repr_html_()
    assert "█" in str(figure)


def test_words_are_escaped() -> None:
    def a_and_b(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return q < kv

    text = cd.show(masks.from_mod(a_and_b), 8)._repr_html_()
    assert "<locals>" not in text
    assert "&lt;locals&gt;" in text


def test_headings_are_short() -> None:
    figure = cd.show(masks.documents(lengths=(7,) * 5000), 35_000)
    assert "5,000 of 35,000 tokens, digest" in figure.heading
    program = Program(tuple(Branch(masks.window(i)) for i in range(40)))
    assert len(cd.show(program, 16).heading) <= 100
    assert repr(figure).startswith("Figure(documents(lengths=<5,000")
