"""Pictures of masks: what may attend to what, exact for few tokens, shares of pairs for many.

pixels       how many pairs each pixel holds, by counting
shades       colours and their legend
characters, vectors, plots     a figure as text, as SVG, and drawn by matplotlib
figures      `show`, and what it returns
"""

from .figures import Figure, show
from .plots import is_installed as can_draw

__all__ = ["Figure", "can_draw", "show"]
