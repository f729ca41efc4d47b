"""The figures of `compiled-dilated bench` as tables for a person."""

from __future__ import annotations

from collections.abc import Callable

from .. import measure
from .bench_measuring import Row


def met(row: Row) -> bool:
    """Whether nothing that the row requires is missed."""
    return row.get("ok") is not False and all(rival["ok"] is not False for rival in row.get("rivals", {}).values())


def tables(rows: list[Row]) -> str:
    """The figures for a person: rates, time per token, short sequences."""
    from tabulate import tabulate

    layouts: dict[str, tuple[list[str], Callable[[Row], list[str]]]] = {
        "rate": (["case", "pass", "ms", "useful GFLOP/s", "of dense", "required", "ok", "against"], _rate_cells),
        "flat": (["case", "microseconds a token", "spread", "at most", "ok"], _flat_cells),
        "short": (["case", "pass", "ms", "dense ms", "times dense", "at most", "ok", "lowering"], _short_cells),
    }
    out = []
    for table, (headers, cells) in layouts.items():
        body = [cells(row) for row in rows if row["table"] == table]
        if body:
            out.append(tabulate(body, headers=headers, disable_numparse=True))
    return "\n\n".join(out)


def _mark(ok: bool | None) -> str:
    return {True: "yes", False: "NO", None: ""}[ok]


def _figure(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _rate_cells(row: Row) -> list[str]:
    if "skipped" in row:
        return [row["case"], row["pass"], "-", "-", "-", "-", "", row["skipped"]]
    against = "; ".join(
        f"{name} {rival['ratio']:.2f}x" + ("" if rival["ok"] is not False else f" (NO: at least {rival['least']:g}x)")
        for name, rival in row["rivals"].items()
    )
    rate = [
        _figure(1e3 * measure.median(row["seconds"]), 1),
        _figure(row["useful_gflops"], 0),
        _figure(row["share"]),
        _figure(row["required_share"]),
    ]
    return [row["case"], row["pass"], *rate, _mark(row["ok"]), against]


def _flat_cells(row: Row) -> list[str]:
    each = ", ".join(f"{int(tokens) // 1024}K {value:.2f}" for tokens, value in row["microseconds_per_token"].items())
    skipped = "".join(f"; {int(tokens) // 1024}K skipped: {reason}" for tokens, reason in row["skipped"].items())
    return [row["case"], each + skipped, _figure(row["spread"]), _figure(row["most_spread"]), _mark(row["ok"])]


def _short_cells(row: Row) -> list[str]:
    times = [_figure(1e3 * measure.median(row[name]), 2) for name in ("seconds", "dense_seconds")]
    return [
        row["case"],
        row["pass"],
        *times,
        _figure(row["ratio"]),
        _figure(row["most_ratio"]),
        _mark(row["ok"]),
        row["lowering"],
    ]
