"""Bad input: the error's type and message, by one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.errors_of_calls import BLOCK_MASKS, PLAN, REFERENCE, RING
from tests.support.errors_of_compile import COMPILE
from tests.support.errors_of_programs import MASKS, ORDERS, PROGRAMS

TABLE = {
    "masks": MASKS,
    "orders": ORDERS,
    "programs": PROGRAMS,
    "compile": COMPILE,
    "plan": PLAN,
    "reference": REFERENCE,
    "block_masks": BLOCK_MASKS,
    "ring": RING,
}


def rows() -> list[Any]:
    """(call, error, fragment of the message) of all tables."""
    parameters = []
    for subject, table in TABLE.items():
        for number, row in enumerate(table):
            parameters.append(pytest.param(*row, id=f"{subject}-{number}-{row[2]}"))
    return parameters


@pytest.mark.parametrize(("call", "error", "fragment"), rows())
def test_bad_input(call: Callable[[], Any], error: type[Exception], fragment: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert fragment in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_table_is_long() -> None:
    assert sum(map(len, TABLE.values())) >= 60
