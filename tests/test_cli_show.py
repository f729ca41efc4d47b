"""`compiled-dilated show` and functions on a command line: what they print and write, what they refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import compiled_dilated as cd
from compiled_dilated import masks, pictures
from compiled_dilated.cli import app

MODS = f"{__name__}:checkered"


def checkered(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q + kv) % 2 == 0


def raises(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q > 3 and kv > 3


number = 3


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def printed(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_it_prints_the_figure() -> None:
    result = run("show", "longnet((16, 32), (1, 2), causal=True)", "--tokens", "48", "--head", "1")
    assert result.exit_code == 0
    assert (
        result.stdout
        == cd.show(cd.longnet((16, 32), (1, 2), causal=True), 48, head=1).text() + "\n"
    )
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_it_writes_files_and_nothing_else(tmp_path: Path) -> None:
    files = {kind: str(tmp_path / f"mask.{kind}") for kind in ("png", "svg", "html")}
    result = run(
        "show",
        "window(3)",
        "-n",
        "20",
        *(word for kind, path in files.items() for word in (f"--{kind}", path)),
    )
    assert result.exit_code == 0
    figure = cd.show(masks.window(3), 20)
    assert Path(files["png"]).read_bytes() == figure.png()
    assert figure._repr_html_() in Path(files["html"]).read_text()
    assert sorted(os.listdir(tmp_path)) == ["mask.html", "mask.png", "mask.svg"]
    assert result.stdout.endswith(f"wrote {', '.join(files.values())}\n")


def test_it_prints_json(tmp_path: Path) -> None:
    file = str(tmp_path / "mask.svg")
    values = printed(run("show", "causal() & window(2)", "-n", "8", "--json", "--svg", file))
    assert values["panels"][0]["allowed_pairs"] == 1 + 2 + 6 * 3
    assert values["pixel"] == [1, 1]
    assert values["files"] == [file]
    values = printed(run("show", "window(1000)", "-n", "1000000", "--json"))
    assert values["panels"][0]["allowed_pairs"] == 10**6 * 2001 - 1000 * 1001
    assert values["pixel"] == [4096, 4096]


def test_it_reads_data(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([[0] * 3 + [1] * 5, [0] * 8]))
    np.save(tmp_path / "padding.npy", np.arange(8) >= 6)
    data = (
        "--data",
        f"ids={tmp_path / 'ids.npy'}",
        "--data",
        f"padding={tmp_path / 'padding.npy'}",
    )
    program = "documents(ids='ids') & padding()"
    for batch, pairs in (("0", 9 + 15), ("1", 48)):
        values = printed(run("show", program, "-n", "8", *data, "--batch", batch, "--json"))
        assert values["panels"][0]["allowed_pairs"] == pairs


def test_functions_are_named_by_their_module() -> None:
    program = f"from_mod('{MODS}', within=window(4)) | sinks(1)"
    mask = masks.from_mod(checkered, within=masks.window(4)) | masks.sinks(1)
    assert run("show", program, "-n", "20").stdout == cd.show(mask, 20).text() + "\n"
    assert (
        run("plan", program, "--shape", "1,2,300,16").stdout
        == cd.plan(mask, (1, 2, 300, 16)).explain() + "\n"
    )


def test_cross_attention_decoding_and_orders() -> None:
    for arguments, pairs in (
        (("causal()", "-n", "2", "--kv-len", "9", "--q-offset", "5"), 6 + 7),
        (("hilbert_window((4, 4), 1)", "-n", "16", "--order", "hilbert(4, 4)"), 100),
    ):
        assert printed(run("show", *arguments, "--json"))["panels"][0]["allowed_pairs"] == pairs
    values = printed(run("show", "longnet((4, 8), (1, 2))", "-n", "16", "--branches", "--json"))
    assert [panel["branches"] for panel in values["panels"]] == [1, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("causal()", "-n", "8", "--head", "8"), "head must be one of 8 heads, 0 to 7; got 8"),
        (("causal()", "-n", "0"), "--tokens"),
        (("causal()", "-n", "8", "--order", "hilbert(2, 2)"), "orders the 4 cells of its grid"),
        (("causal()", "-n", "8", "--order", "causal()"), "an order is needed"),
        (("causal()", "-n", "8", "--png", "mask.txt"), "--png takes a path that ends in .png; got 'mask.txt'"),
        (("causal()", "-n", "8", "--svg", "nowhere/mask.svg"), "--svg: no folder 'nowhere'"),
        (("padding()", "-n", "8"), "the program reads padding; got --data for nothing. Pass --data NAME=FILE.npy"),
        (("causal()", "-n", "8", "--data", "ids=ids.npy"), "the program reads no data; got --data for ids"),
        (("padding()", "-n", "8", "--data", "padding"), "--data takes NAME=FILE.npy, as documents=ids.npy; got 'padding'"),
        (("padding()", "-n", "8", "--data", "padding=none.npy"), "--data padding: no file 'none.npy'"),
        (("padding()", "-n", "8", "--data", "padding=text.npy"), "is no array of numbers that numpy.save wrote"),
        (("padding()", "-n", "8", "--data", "padding=cube.npy"), "(batch, tokens) or (tokens); got shape (2, 2, 2)"),
        (("padding()", "-n", "8", "--data", "padding=words.npy"), "must hold integers or bools"),
        (("padding()", "-n", "8", "--data", "padding=ids.npy"), "must be a bool tensor, True where a key is padding"),
        (("documents(ids='x')", "-n", "9", "--data", "x=ids.npy"), "at least 9 tokens; got shape (1, 8)"),
        (("padding()", "-n", "8", "--data", "padding=ids.npy", "--data", "padding=ids.npy"), "names 'padding' twice"),
        (("from_mod('checkered')", "-n", "8"), "from_mod takes 'MODULE:FUNCTION' here"),
        (("from_mod(3)", "-n", "8"), "from_mod takes 'MODULE:FUNCTION' here"),
        (("from_mod('no_such_module:f')", "-n", "8"), "No module named 'no_such_module'"),
        ((f"from_mod('{__name__}:nothing')", "-n", "8"), "has no function 'nothing'"),
        ((f"from_mod('{__name__}:number')", "-n", "8"), "has no function 'number'"),
        ((f"from_mod('{__name__}:raises')", "-n", "8"), "mask_mod raises reads the value of a score or an index"),
        (("from_mud(3)", "-n", "8"), "did you mean from_mod?"),
    ],
)  # fmt: skip
def test_show_refuses(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.arange(8))
    np.save("cube.npy", np.zeros((2, 2, 2), dtype=bool))
    np.save("words.npy", np.array(["a"] * 8))
    Path("text.npy").write_text("no array")
    before = sorted(os.listdir())
    result = run("show", *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir()) == before


def test_a_png_without_matplotlib_is_bad_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures.plots.importlib.util, "find_spec", lambda name: None)
    result = run("show", "causal()", "-n", "8", "--png", str(tmp_path / "mask.png"))
    assert result.exit_code == 2
    assert "install it with pip install 'compiled-dilated[show]'" in " ".join(result.stderr.split())
    assert run("show", "causal()", "-n", "8", "--svg", str(tmp_path / "mask.svg")).exit_code == 0
    assert run("demo", "--quick", "--out", str(tmp_path / "out")).exit_code == 2


def test_text_alone_has_no_functions() -> None:
    """A program in a file or a rule never imports anything."""
    from compiled_dilated.text import ExpressionError, read_program

    with pytest.raises(ExpressionError, match="no mask, order or program is called 'from_mod'"):
        read_program(f"from_mod('{MODS}')")
