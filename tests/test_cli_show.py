"""`compiled-dilated show`, and functions on a command line: output, files, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import compiled_dilated as cd
from compiled_dilated import masks
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
    figure = cd.show(cd.longnet((16, 32), (1, 2), causal=True), 48, head=1)
    assert result.stdout == figure.text() + "\n"
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_it_writes_files_and_nothing_else(tmp_path: Path) -> None:
    files = {kind: str(tmp_path / f"mask.{kind}") for kind in ("png", "svg", "html")}
    options = []
    for kind, path in files.items():
        options += [f"--{kind}", path]
    result = run("show", "window(3)", "-n", "20", *options)
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


def test_it_reads_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.array([[0] * 3 + [1] * 5, [0] * 8]))
    np.save("padding.npy", np.arange(8) >= 6)
    data = ("--data", "ids=ids.npy", "--data", "padding=padding.npy")
    program = "documents(ids='ids') & padding()"
    for batch, pairs in (("0", 9 + 15), ("1", 48)):
        values = printed(run("show", program, "-n", "8", *data, "--batch", batch, "--json"))
        assert values["panels"][0]["allowed_pairs"] == pairs


def test_functions_are_named_by_their_module() -> None:
    program = f"from_mod('{MODS}', within=window(4)) | sinks(1)"
    mask = masks.from_mod(checkered, within=masks.window(4)) | masks.sinks(1)
    assert run("show", program, "-n", "20").stdout == cd.show(mask, 20).text() + "\n"
    explanation = cd.plan(mask, (1, 2, 300, 16)).explain()
    assert run("plan", program, "--shape", "1,2,300,16").stdout == explanation + "\n"


def test_cross_attention_decoding_and_orders() -> None:
    for arguments, pairs in (
        (("causal()", "-n", "2", "--kv-len", "9", "--q-offset", "5"), 6 + 7),
        (("hilbert_window((4, 4), 1)", "-n", "16", "--order", "hilbert(4, 4)"), 100),
    ):
        assert printed(run("show", *arguments, "--json"))["panels"][0]["allowed_pairs"] == pairs
    values = printed(run("show", "longnet((4, 8), (1, 2))", "-n", "16", "--branches", "--json"))
    assert [panel["branches"] for panel in values["panels"]] == [1, 1, 2]


# Programs that cannot be shown, at 8 tokens.
PROGRAMS = {
    "from_mod('checkered')": "from_mod takes 'MODULE:FUNCTION' here",
    "from_mod(3)": "from_mod takes 'MODULE:FUNCTION' here",
    "from_mod('no_such_module:f')": "No module named 'no_such_module'",
    f"from_mod('{__name__}:nothing')": "has no function 'nothing'",
    f"from_mod('{__name__}:number')": "has no function 'number'",
    f"from_mod('{__name__}:raises')": "mask_mod raises reads the value of a score or an index",
    "from_mud(3)": "did you mean from_mod?",
    "padding()": "the program reads padding; got --data for nothing. Pass --data NAME=FILE.npy",
}
# Options that do not fit causal() at 8 tokens.
OPTIONS = {
    "--head 8": "head must be one of 8 heads, 0 to 7; got 8",
    "--tokens 0": "--tokens",
    "--order hilbert(2,2)": "orders the 4 cells of its grid",
    "--order causal()": "an order is needed",
    "--png mask.txt": "--png takes a path that ends in .png; got 'mask.txt'",
    "--svg nowhere/mask.svg": "--svg: no folder 'nowhere'",
    "--data ids=ids.npy": "the program reads no data; got --data for ids",
}
# Data that do not fit padding('p') at 8 tokens.
DATA = {
    "p": "--data takes NAME=FILE.npy, as documents=ids.npy; got 'p'",
    "p=none.npy": "--data p: no file 'none.npy'",
    "p=text.npy": "is no array of numbers that numpy.save wrote",
    "p=cube.npy": "(batch, tokens) or (tokens); got shape (2, 2, 2)",
    "p=words.npy": "must hold integers or bools",
    "p=ids.npy": "must be a bool tensor, True where a key is padding",
    "p=short.npy": "at least 8 tokens; got shape (1, 7)",
    "p=ids.npy --data p=ids.npy": "names 'p' twice",
}
REFUSED = [
    *(((program, "-n", "8"), message) for program, message in PROGRAMS.items()),
    *((("causal()", "-n", "8", *words.split()), message) for words, message in OPTIONS.items()),
    *(
        (("padding('p')", "-n", "8", "--data", *words.split()), message)
        for words, message in DATA.items()
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_show_refuses(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.arange(8))
    np.save("short.npy", np.arange(7) > 3)
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
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("show", "causal()", "-n", "8", "--png", str(tmp_path / "mask.png"))
    assert result.exit_code == 2
    assert "install it with pip install 'compiled-dilated[show]'" in " ".join(result.stderr.split())
    assert run("show", "causal()", "-n", "8", "--svg", str(tmp_path / "mask.svg")).exit_code == 0


def test_text_alone_has_no_functions() -> None:
    """A program in a file or a rule never imports anything."""
    from compiled_dilated.parsing import ExpressionError
    from compiled_dilated.text import read_program

    with pytest.raises(ExpressionError, match="no mask, order or program is called 'from_mod'"):
        read_program(f"from_mod('{MODS}')")
