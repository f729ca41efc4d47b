"""Pictures of masks: single pairs, or shares of pairs for many tokens.

pixels       allowed pairs of each pixel, by counting
shades       colours and their legend
characters   a figure as text
vectors      a figure as SVG
plots        a figure as PNG or PDF, by matplotlib
figures      the figure: captions, formats, files
drawing      `show`: a figure from a program
"""

from .drawing import show
from .figures import Figure
from .plots import is_installed as can_draw

__all__ = ["Figure", "can_draw", "show"]
