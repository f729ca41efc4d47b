"""Packages: the numbers of the model at every length; what is missing, altered or unfit is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaged import SUFFIXES, Exported, Model, of_model, qkv
from torch import Tensor, nn
from typer.testing import CliRunner

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.cli import app
from compiled_dilated.native import build

LENGTHS = (1, 2, 3, 7, 63, 64, 65, 100, 257, 1000)


@pytest.fixture(scope="module")
def longnet(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    program, path = cd.longnet((16, 64), (1, 4)), tmp_path_factory.mktemp("longnet") / "model.pt2"
    q, k, _ = qkv(100)
    # One tensor as keys and values: torch.export would make one input of it.
    return Exported(
        program, path, cd.export(program, (q, k, k), path, lengths=(1, 2**20), batches=(1, 8))
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    model, path = Model(), tmp_path_factory.mktemp("whole") / "model.pt2"
    return Exported(model, path, cd.export(model, of_model(50), path, lengths=(2, 4096)))


def test_a_program_at_every_length_and_batch(longnet: Exported) -> None:
    run, attend = cd.load(longnet.path), cd.compile(longnet.model)
    for tokens in LENGTHS:
        for batch in (1, 3):
            inputs = qkv(tokens, batch)
            torch.testing.assert_close(run(*inputs), attend(*inputs), rtol=1e-6, atol=1e-6)
            expected = cd.reference(longnet.model, *(x.double() for x in inputs))
            torch.testing.assert_close(run(*inputs).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_model_with_data_and_a_function(whole: Exported) -> None:
    run = cd.load(whole.path)
    for tokens in LENGTHS[1:]:
        inputs = of_model(tokens)
        with torch.no_grad():
            torch.testing.assert_close(run(*inputs), whole.model(*inputs), rtol=1e-5, atol=1e-6)


def test_inputs_in_any_layout(longnet: Exported, whole: Exported) -> None:
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(65)]
    torch.testing.assert_close(
        cd.load(longnet.path)(*by_token), cd.compile(longnet.model)(*by_token), rtol=1e-6, atol=1e-6
    )
    x, padding = of_model(65)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(
            cd.load(whole.path)(turned, padding), whole.model(x, padding), rtol=1e-5, atol=1e-6
        )


def test_inspect_says_what_was_exported(longnet: Exported, whole: Exported) -> None:
    about = cd.inspect(longnet.path)
    assert about == longnet.about
    assert about.name == repr(longnet.model)
    assert about.entries["model"].ranges == {"tokens": (1, 2**20), "batch": (1, 8)}
    lines = str(about).splitlines()
    assert "    input 0: float32 (batch, 4, tokens, 16)" in lines
    assert "    tokens: 1 to 1,048,576" in lines
    (attention,) = [line for line in lines if "attention 0" in line]
    assert "segments(64)" in attention
    assert "4 query heads on 2 of keys, width 16; one call of the native kernel" in attention
    assert f"torch {torch.__version__.partition('+')[0]}, compiled_dilated " in lines[-5]
    json.dumps(about.to_json())
    assert "input 0: float32 (2, tokens, 32), contiguous" in str(whole.about)
    assert "with a score_mod; 4 query heads" in str(whole.about)


def test_inspect_opens_one_file(longnet: Exported, tmp_path: Path) -> None:
    path = longnet.copied(tmp_path)
    for suffix in SUFFIXES:
        if suffix != ".json":
            path.with_name(path.name + suffix).unlink()
    assert cd.inspect(path) == longnet.about


# The command line -------------------------------------------------------------------------------------------------------------


def run_command(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_here.py").write_text(
        "import torch\n"
        "from compiled_dilated import masks\n"
        "def make():\n"
        "    return masks.causal() & masks.window(8), tuple(torch.randn(1, 2, 20, 8) for _ in range(3))\n"
        "def wrong():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    done = run_command("export", "made_here:make", "model.pt2", "--lengths", "1,4096", "--json")
    assert done.exit_code == 0, done.output
    shown = run_command("inspect", "model.pt2")
    assert "tokens: 1 to 4,096" in shown.stdout
    assert json.loads(run_command("inspect", "model.pt2", "--json").stdout) == json.loads(
        done.stdout[done.stdout.index("{") :]
    )
    q, k, v = (torch.randn(1, 2, 33, 8) for _ in range(3))
    want = cd.compile(masks.causal() & masks.window(8))(q, k, v)
    torch.testing.assert_close(cd.load("model.pt2")(q, k, v), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "none.pt2"), "none.pt2.json is missing"),
        (("export", "nowhere:make", "model.pt2"), "No module named 'nowhere'"),
        (
            ("export", "json:nothing", "model.pt2"),
            "MODULE:FACTORY must name a function; json has no function 'nothing'",
        ),
        (
            ("export", "time:time", "model.pt2"),
            "must return (model or program, example inputs); got float",
        ),
        (("export", "time:time", "model.pt2", "--lengths", "3"), "must return"),
    ],
)
def test_bad_usage_of_the_commands(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    done = run_command(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


# Refusals ---------------------------------------------------------------------------------------------------------------------

UNFIT = [
    (
        lambda: [x.double() for x in qkv(50)],
        TypeError,
        "input 0 must be float32 on a CPU; got float64 on a CPU",
    ),
    (
        lambda: qkv(50, batch=9),
        ValueError,
        "batch must be from 1 to 8, for which the package was made; got 9",
    ),
    (
        lambda: qkv(0),
        ValueError,
        "tokens must be from 1 to 1,048,576, for which the package was made; got 0",
    ),
    (
        lambda: qkv(50, heads=8),
        ValueError,
        "input 0 must have the shape (batch, 4, tokens, 16); got (2, 8, 50, 16)",
    ),
    (
        lambda: (*qkv(50)[:2], qkv(51)[2]),
        ValueError,
        "input 2 must have the shape (batch, 2, tokens, 16); got (2, 2, 51, 16)",
    ),
    (
        lambda: [x[0] for x in qkv(50)],
        ValueError,
        "input 0 must have the shape (batch, 4, tokens, 16); got (4, 50, 16)",
    ),
]


@pytest.mark.parametrize(("inputs", "error", "message"), UNFIT)
def test_unfit_inputs_are_refused(
    longnet: Exported, inputs: Callable[[], Any], error: type[Exception], message: str
) -> None:
    """By a loaded package and, in the same words, by its graph."""
    with pytest.raises(error) as loaded:
        cd.load(longnet.path)(*inputs())
    assert str(loaded.value) == message
    with pytest.raises(RuntimeError) as raw:
        torch._inductor.aoti_load_package(str(longnet.path))(*inputs())
    assert str(raw.value).splitlines()[0] == message


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (lambda: qkv(50)[:2], "the package takes 3 tensors; got 2"),
        (lambda: (1, 2, 3), "input 0 must be a tensor; got int"),
    ],
)
def test_what_is_no_tensor_is_refused(
    longnet: Exported, inputs: Callable[[], Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        cd.load(longnet.path)(*inputs())


def test_a_package_without_decoding_says_so(longnet: Exported) -> None:
    with pytest.raises(ValueError, match="has no entry for decoding; export it with decode=True"):
        cd.load(longnet.path).decode(*qkv(50, queries=1))


def test_generated_code_takes_no_other_layout(whole: Exported) -> None:
    x, padding = of_model(65)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match="input 0 must be contiguous"):
        torch._inductor.aoti_load_package(str(whole.path))(turned, padding)


@pytest.fixture
def copied(longnet: Exported, tmp_path: Path) -> Path:
    return longnet.copied(tmp_path)


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".json"])
def test_an_altered_file_is_refused(copied: Path, suffix: str) -> None:
    file = copied.with_name(copied.name + suffix)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not the file that was written: its digest differs"):
        cd.load(copied)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named(copied: Path, suffix: str) -> None:
    copied.with_name(copied.name + suffix).unlink()
    with pytest.raises(FileNotFoundError, match=rf"model.pt2{suffix} is missing"):
        cd.load(copied)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"torch": "2.10.0"}, "the package is for torch 2.10.0; this is"),
        (
            {"isa": "native", "cpu": "VSX"},
            "the package is for CPUs with VSX alone, as isa='native' makes it; this one has",
        ),
        ({"machine": "s390x"}, "the package is for s390x; this machine is"),
        (
            {"kernel": "0" * 64},
            "for the kernel of another version of compiled_dilated. Export it again with this one",
        ),
        ({"format": 1}, "its format is 1, and this version reads 2"),
        ({"entries": None}, "does not describe a package"),
        ({"entries": {"model": {}}}, "does not describe a package"),
        (None, "does not describe a package"),
    ],
)
def test_another_machine_or_version_is_refused(
    copied: Path, fields: dict[str, Any] | None, message: str
) -> None:
    beside = copied.with_name("model.pt2.json")
    beside.write_text(
        "{" if fields is None else json.dumps({**json.loads(beside.read_text()), **fields})
    )
    with pytest.raises(ValueError, match=message):
        cd.load(copied)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": "model.so"}, ValueError, r"path must end with .pt2; got 'model.so'"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, a program or a mask; got int"),
        ({"model": cd.compile(masks.causal())}, TypeError, "export takes the program itself"),
        (
            {"lengths": (9, 3)},
            ValueError,
            r"lengths must be the least and the most, as \(1, 65536\); got \(9, 3\)",
        ),
        (
            {"lengths": (1, 30)},
            ValueError,
            r"example_inputs must have tokens within the range \(1, 30\); got 50",
        ),
        (
            {"example_inputs": qkv(1), "lengths": (1, 30)},
            ValueError,
            "must have at least 2 tokens where that varies; got 1",
        ),
        (
            {"example_inputs": (1, 2, 3)},
            TypeError,
            r"example_inputs\[0\] must be a tensor on a CPU; got int",
        ),
        (
            {"example_inputs": qkv(9)[0]},
            TypeError,
            "example_inputs must be a sequence of tensors; got Tensor",
        ),
        ({"example_inputs": ()}, ValueError, "example_inputs is empty"),
        (
            {"example_inputs": [x.cfloat() for x in qkv(9)]},
            TypeError,
            "must have one of the dtypes float32, .*; got complex64",
        ),
        ({"isa": "sse"}, ValueError, "isa must be one of 'avx2', 'native'; got 'sse'"),
    ],
)
def test_bad_exports_are_refused(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "model": masks.causal(),
        "example_inputs": qkv(50),
        "path": tmp_path / "model.pt2",
        **options,
    }
    with pytest.raises(error, match=message):
        cd.export(**settings)
    assert not list(tmp_path.iterdir())


class OfTiles(nn.Module):
    """Attention that the native kernel does not compute."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = cd.compile(masks.causal(), lowering="tiled")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.attend(q, k, v)
        return out


def test_what_needs_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="the graph holds attention that the native kernel does not compute for all lengths",
    ):
        cd.export(OfTiles(), qkv(50), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        build.NativeUnavailable,
        match="CXX='no-such-compiler' names no program that can be found; set CXX",
    ):
        cd.export(masks.causal(), qkv(50), tmp_path / "model.pt2")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        build.NativeUnavailable, match=r"no C\+\+ compiler is on PATH; install g\+\+"
    ):
        cd.export(masks.causal(), qkv(50), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention"), [("llama", cd.longnet((16, 64), (1, 4), causal=True)), ("mistral", None)]
)
def test_models_of_transformers(name: str, attention: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers_models import inputs_of, model_of

    model = cd.compile(model_of(name, "eager", use_cache=False), attention=attention)
    cd.export(
        model,
        (inputs_of(name)["input_ids"],),
        tmp_path / "model.pt2",
        lengths=(2, 512),
        batches=(1, 8),
    )
    run = cd.load(tmp_path / "model.pt2")
    for tokens in (2, 50, 101):
        ids = inputs_of(name, tokens, batch=3)["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(run(ids).logits, model(ids).logits, rtol=1e-5, atol=2e-6)
