"""Programs and ways to run them within limits of memory and time.

candidates    programs to consider: dense, LongNet, a window, or a pattern of the user's own
ways          one call, a ring, or a stream from files: bytes and seconds of each, by its plan
options       the table of candidates and ways, and the choice among them
reports       the table as text and as plain values
"""

from .options import Recommendation, recommend
from .ways import Request

__all__ = ["Recommendation", "Request", "recommend"]
