"""How many rows a chunk has, as passes are told: a number of them, or what they may take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class Chunked(Protocol):
    """A pass that is given one of these, or neither."""

    @property
    def rows(self) -> int | None: ...

    @property
    def chunk_bytes(self) -> int | None: ...


def check(given: Chunked) -> None:
    """Raises ValueError where one of them is less than 1, or both are given."""
    if given.rows is not None and given.chunk_bytes is not None:
        raise ValueError(f"rows or chunk_bytes, not both; got {given}")
    for name, value in (("rows", given.rows), ("chunk_bytes", given.chunk_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")


def parts(rows: int, chunk_rows: int) -> Iterator[slice]:
    """The chunks of so many rows; the last may be shorter."""
    return (slice(start, min(start + chunk_rows, rows)) for start in range(0, rows, chunk_rows))


def rows_of(given: Chunked, row_bytes: int, otherwise_bytes: int) -> int:
    """Rows of a chunk, at least one. otherwise_bytes: what they may take where nobody says."""
    return given.rows or max(1, (given.chunk_bytes or otherwise_bytes) // row_bytes)
