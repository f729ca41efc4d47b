"""Long lists of numbers, abbreviated for people."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

# Lists of more numbers are written as their count.
MOST_NUMBERS = 12


def brief(numbers: Sequence[int], unit: str, code: str) -> str:
    """Code of a short list; count and digest of a long one.

    unit: what the numbers are, in the plural.
    code: the expression that creates the list.
    """
    if len(numbers) <= MOST_NUMBERS:
        return code
    data = np.asarray(numbers, dtype=np.int64).tobytes()
    digest = hashlib.blake2b(data, digest_size=4).hexdigest()
    return f"<{len(numbers):,} {unit}, digest {digest}>"
