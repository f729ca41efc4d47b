"""A figure as PNG or PDF, by matplotlib, an optional dependency."""

from __future__ import annotations

import importlib.util
import io
import textwrap
from typing import TYPE_CHECKING

from .shades import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .figures import Figure, Panel

_DPI = 160
# Side of a panel in inches: each of 256 pixels is more than two dots wide.
_SIDE = 4.2
_MOST_STRETCH = 4
_MOST_IN_A_ROW = 3


def is_installed() -> bool:
    """Whether matplotlib can be imported."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(figure: Figure, kind: str) -> bytes:
    """The bytes of a PNG or PDF file."""
    if not is_installed():
        raise ImportError(
            f"a {kind.upper()} of a mask needs matplotlib; install it with "
            "pip install 'compiled-dilated[show]', "
            "or save as .svg, .html or .txt, which need nothing"
        )
    # Slow to import. A figure without pyplot: no window, no global state.
    from matplotlib.figure import Figure as Canvas
    from matplotlib.patches import Patch

    # Up to three panels in one row, more in two.
    panels = figure.panels
    columns = len(panels)
    if columns > _MOST_IN_A_ROW:
        columns = -(-columns // 2)
    rows = -(-len(panels) // columns)
    size = (max(6.2, columns * (_SIDE + 1.1)), rows * (_SIDE + 1.2) + 1.1)
    canvas = Canvas(figsize=size, layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False).reshape(-1)
    for panel, ax in zip(panels, axes, strict=False):
        _panel(figure, panel, ax)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    # Headings above, one legend for all panels below.
    width = int(12.5 * canvas.get_figwidth())
    lines = [*textwrap.wrap(figure.heading, width), *textwrap.wrap(figure.subheading, width)]
    canvas.suptitle("\n".join(lines), fontsize=9, color=INK)
    handles = [
        Patch(facecolor=color, edgecolor=INK, linewidth=0.5, label=name)
        for name, color in figure.shades.legend
    ]
    legend = canvas.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8,
        frameon=False, labelcolor=INK, title=figure.shades.meaning or None, title_fontsize=8,
    )  # fmt: skip
    legend.get_title().set_color(INK)
    buffer = io.BytesIO()
    # Transparent, for light and dark pages; without a date, so that equal figures are equal files.
    metadata = {"CreationDate": None}
    if kind == "png":
        metadata = {"Software": None}
    canvas.savefig(buffer, format=kind, dpi=_DPI, transparent=True, metadata=metadata)
    return buffer.getvalue()


def _panel(figure: Figure, panel: Panel, ax: Axes) -> None:
    """Draw a panel: its image, axes and caption."""
    from matplotlib.ticker import MaxNLocator

    pixels = panel.pixels
    image = figure.shades.image(pixels.means)
    # The last pixel may be short: the image extends beyond the axes' limits.
    height = pixels.size[0] * pixels.counts.shape[0]
    width = pixels.size[1] * pixels.counts.shape[1]
    left, top = int(pixels.kv_cuts[0]), int(pixels.q_cuts[0])
    queries, keys = int(pixels.q_cuts[-1]) - top, int(pixels.kv_cuts[-1]) - left
    stretch = min(max(queries / keys, 1 / _MOST_STRETCH), _MOST_STRETCH)
    extent = (left, left + width, top + height, top)
    ax.imshow(image, extent=extent, interpolation="nearest", aspect=stretch * keys / queries)
    # Axes: names, limits, and ticks at whole positions.
    q_name, kv_name = figure.axes
    ax.set(xlim=(left, left + keys), ylim=(top + queries, top))
    ax.set_xlabel(kv_name, fontsize=8, color=INK)
    ax.set_ylabel(q_name, fontsize=8, color=INK)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:,.0f}")
        axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.tick_params(labelsize=7, colors=INK)
    for spine in ax.spines.values():
        spine.set_color(INK)
    ax.set_title(textwrap.fill(figure.caption_of(panel), 62), fontsize=8, color=INK)
