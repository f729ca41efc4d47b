"""Packages: the model's numbers at every length.

Missing, altered or unfit files are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.native import build, cpp
from tests.packaged import SUFFIXES, Exported, Model, of_model, qkv

LENGTHS = (1, 2, 3, 7, 63, 64, 65, 100, 257, 1000)


@pytest.fixture(scope="module")
def longnet(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    program, path = cd.longnet((16, 64), (1, 4)), tmp_path_factory.mktemp("longnet") / "model.pt2"
    q, k, _ = qkv(100)
    # One tensor as keys and values: torch.export would merge the two inputs.
    about = cd.export(program, (q, k, k), path, lengths=(1, 2**20), batches=(1, 8))
    return Exported(program, path, about)


@pytest.fixture(scope="module")
def with_data(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    model, path = Model(), tmp_path_factory.mktemp("with_data") / "model.pt2"
    return Exported(model, path, cd.export(model, of_model(50), path, lengths=(2, 4096)))


def test_a_program_at_every_length_and_batch(longnet: Exported) -> None:
    run, attend = cd.load(longnet.path), cd.compile(longnet.model)
    for tokens in LENGTHS:
        for batch in (1, 3):
            inputs = qkv(tokens, batch)
            torch.testing.assert_close(run(*inputs), attend(*inputs), rtol=1e-6, atol=1e-6)
            expected = cd.reference(longnet.model, *(x.double() for x in inputs))
            torch.testing.assert_close(run(*inputs).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_model_with_data_and_a_function(with_data: Exported) -> None:
    run = cd.load(with_data.path)
    for tokens in LENGTHS[1:]:
        inputs = of_model(tokens)
        with torch.no_grad():
            torch.testing.assert_close(run(*inputs), with_data.model(*inputs), rtol=1e-5, atol=1e-6)


def test_inputs_in_any_layout(longnet: Exported, with_data: Exported) -> None:
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(65)]
    expected = cd.compile(longnet.model)(*by_token)
    torch.testing.assert_close(cd.load(longnet.path)(*by_token), expected, rtol=1e-6, atol=1e-6)
    x, padding = of_model(65)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    with torch.no_grad():
        expected = with_data.model(x, padding)
    out = cd.load(with_data.path)(strided, padding)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_inspect_describes_the_export(longnet: Exported, with_data: Exported) -> None:
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
    assert "input 0: float32 (2, tokens, 32), contiguous" in str(with_data.about)
    assert "with a score_mod; 4 query heads" in str(with_data.about)


def test_inspect_opens_one_file(longnet: Exported, tmp_path: Path) -> None:
    path = longnet.copied(tmp_path)
    for suffix in SUFFIXES:
        if suffix != ".json":
            path.with_name(path.name + suffix).unlink()
    assert cd.inspect(path) == longnet.about


# Refusals

# Inputs that do not fit the package of `longnet`, and the message.
UNFIT = [
    (lambda: qkv(50, batch=9), "batch must be from 1 to 8, for which the package was made; got 9"),
    (
        lambda: qkv(0),
        "tokens must be from 1 to 1,048,576, for which the package was made; got 0",
    ),
    (
        lambda: qkv(50, heads=8),
        "input 0 must have the shape (batch, 4, tokens, 16); got (2, 8, 50, 16)",
    ),
    (
        lambda: (*qkv(50)[:2], qkv(51)[2]),
        "input 2 must have the shape (batch, 2, tokens, 16); got (2, 2, 51, 16)",
    ),
    (
        lambda: [x[0] for x in qkv(50)],
        "input 0 must have the shape (batch, 4, tokens, 16); got (4, 50, 16)",
    ),
]


@pytest.mark.parametrize(("inputs", "message"), UNFIT)
def test_unfit_inputs_are_refused(
    longnet: Exported, inputs: Callable[[], Any], message: str
) -> None:
    """By a loaded package and, with the same message, by its graph."""
    check_refusal(longnet, inputs(), ValueError, message)


def test_fewer_tokens_than_the_least_are_refused(with_data: Exported) -> None:
    message = "tokens must be from 2 to 4,096, for which the package was made; got 1"
    check_refusal(with_data, of_model(1), ValueError, message)


def test_another_dtype_is_refused(longnet: Exported) -> None:
    inputs = [x.double() for x in qkv(50)]
    message = "input 0 must be float32 on a CPU; got float64 on a CPU"
    check_refusal(longnet, inputs, TypeError, message)


def check_refusal(package: Exported, inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as loaded:
        cd.load(package.path)(*inputs)
    assert str(loaded.value) == message
    with pytest.raises(RuntimeError) as raw:
        torch._inductor.aoti_load_package(str(package.path))(*inputs)
    assert str(raw.value).splitlines()[0] == message


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (lambda: qkv(50)[:2], "the package takes 3 tensors; got 2"),
        (lambda: (1, 2, 3), "input 0 must be a tensor; got int"),
    ],
)
def test_other_arguments_are_refused(
    longnet: Exported, inputs: Callable[[], Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        cd.load(longnet.path)(*inputs())


def test_decoding_by_a_package_without_it_is_refused(longnet: Exported) -> None:
    with pytest.raises(ValueError, match="has no entry for decoding; export it with decode=True"):
        cd.load(longnet.path).decode(*qkv(50, queries=1))


def test_a_raw_package_refuses_other_strides_of_generated_code(with_data: Exported) -> None:
    x, padding = of_model(65)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match="input 0 must be contiguous"):
        torch._inductor.aoti_load_package(str(with_data.path))(strided, padding)


def test_the_folder_of_an_unfinished_export_says_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def interrupted(*_: object) -> None:
        names.extend(path.name for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(cpp, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cd.export(masks.causal(), qkv(50), tmp_path / "model.pt2")
    assert [name.partition("-")[0] for name in names] == ["model.pt2.unfinished"]
    assert not list(tmp_path.iterdir())


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
        ({"isa": "native", "cpu": "VSX"}, "for CPUs with VSX alone, as isa='native' makes it;"),
        ({"machine": "s390x"}, "the package is for s390x; this machine is"),
        ({"kernel": "0" * 64}, "for the kernel of another version of compiled_dilated. Export it"),
        ({"isa": "sm_90"}, "the package is for a GPU, sm_90, and torch .* finds none"),
        ({"format": 1}, "its format is 1, and this version reads 3"),
        ({"entries": None}, "does not describe a package"),
        ({"entries": {}}, "does not describe a package: it has no entry 'model'"),
        ({"files": {}}, "does not describe a package: it has no digests of .pt2"),
        ({"files": None}, "does not describe a package"),
        ({"isa": "sse"}, "does not describe a package: its isa is 'sse'"),
        ({"entries": {"model": {}}}, "does not describe a package"),
    ],
)
def test_another_machine_or_version_is_refused(
    copied: Path, fields: dict[str, Any], message: str
) -> None:
    description = copied.with_name("model.pt2.json")
    description.write_text(json.dumps({**json.loads(description.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        cd.load(copied)


@pytest.mark.parametrize(
    ("cuda", "capability", "message"),
    [
        ("12.6", (9, 0), "for a torch built with CUDA 13.0; this one, .*, is built with 12.6"),
        ("13.0", (10, 0), "kernels are for sm_90; this GPU, some GPU, is sm_100. Export it on"),
        ("13.0", (9, 0), None),
    ],
)
def test_a_package_of_a_gpu_runs_on_its_kind_alone(
    longnet: Exported,
    monkeypatch: pytest.MonkeyPatch,
    cuda: str,
    capability: tuple[int, int],
    message: str | None,
) -> None:
    about = replace(longnet.about, isa="sm_90", cuda="13.0")
    assert "code for sm_90, CUDA 13.0" in str(about)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    if message is None:
        about.check_machine()
        return
    with pytest.raises(ValueError, match=message):
        about.check_machine()


def test_an_entry_of_a_gpu_takes_no_tensors_of_a_cpu(longnet: Exported) -> None:
    entry = replace(longnet.about.entries["model"], device="cuda")
    message = "input 0 must be float32 on a GPU; got float32 on a CPU"
    with pytest.raises(TypeError, match=message):
        entry.check(qkv(50))
    cd.load(longnet.path)(*qkv(50))
    # The check in the graph has the same words, and an implementation for tensors of a GPU.
    with pytest.raises(RuntimeError, match=message):
        torch.ops.compiled_dilated.check_inputs(list(qkv(50)), entry.code)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel("compiled_dilated::check_inputs", "CUDA")


def test_a_description_that_is_no_json_is_refused(copied: Path) -> None:
    for text in ("{", "[" * 100_000):
        copied.with_name("model.pt2.json").write_text(text)
        with pytest.raises(ValueError, match="does not describe a package"):
            cd.load(copied)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "model.so"}, r"path must end with .pt2; got 'model.so'"),
        ({"path": "nowhere/model.pt2"}, "must be in a directory that exists; got 'nowhere/model"),
        ({"example_inputs": qkv(9)[:2]}, "example_inputs must be q, k, v; got 2 tensors"),
        ({"lengths": (1, 2**30 + 1)}, r"lengths must end at 1073741824 or before, .*; got"),
        ({"lengths": (9, 3)}, r"lengths must be the least and the most, as .*; got \(9, 3\)"),
        ({"lengths": (1, 30)}, r"must have tokens within the range \(1, 30\); got 50"),
        ({"example_inputs": qkv(1), "lengths": (1, 30)}, "at least 2 tokens where that varies"),
        ({"example_inputs": ()}, "example_inputs is empty"),
        ({"isa": "sse"}, "isa must be one of 'avx2', 'native'; got 'sse'"),
    ],
)
def test_bad_values_of_export_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 3}, "model must be a torch.nn.Module, a program or a mask; got int"),
        ({"model": cd.compile(masks.causal())}, "export takes the program itself"),
        ({"example_inputs": (1, 2, 3)}, "must be a tensor on a CPU or a GPU; got int"),
        ({"example_inputs": qkv(9)[0]}, "must be a sequence of tensors; got Tensor"),
        ({"example_inputs": [x.to("meta") for x in qkv(9)]}, "or a GPU; got one on meta"),
        (
            {"example_inputs": [x.to(torch.complex64) for x in qkv(9)]},
            "the dtypes float32, .*; got complex64",
        ),
    ],
)
def test_bad_types_of_export_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=message):
        export(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_path_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"path must name a package, FILE.pt2; got '\.'"):
        cd.inspect(".")


def export(folder: Path, **options: Any) -> None:
    """Export a causal mask, with some arguments replaced."""
    settings = {"model": masks.causal(), "example_inputs": qkv(50), "path": folder / "model.pt2"}
    cd.export(**{**settings, **options})


class OfTiles(nn.Module):
    """Attention that the native kernel does not compute."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = cd.compile(masks.causal(), lowering="tiled")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.attend(q, k, v)
        return out


def test_attention_that_needs_python_is_refused(tmp_path: Path) -> None:
    message = "the graph holds attention that the native kernel does not compute for all lengths"
    with pytest.raises(ValueError, match=message):
        cd.export(OfTiles(), qkv(50), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = "CXX='no-such-compiler' names no program that can be found; set CXX"
    with pytest.raises(build.NativeUnavailable, match=message):
        export(tmp_path)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    message = r"no C\+\+ compiler is on PATH; install g\+\+"
    with pytest.raises(build.NativeUnavailable, match=message):
        export(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention"), [("llama", cd.longnet((16, 64), (1, 4), causal=True)), ("mistral", None)]
)
def test_models_of_transformers(name: str, attention: Any, tmp_path: Path) -> None:
    from tests.transformers_models import inputs_of, model_of

    model = cd.compile(model_of(name, "eager", use_cache=False), attention=attention)
    path, ids = tmp_path / "model.pt2", inputs_of(name)["input_ids"]
    cd.export(model, (ids,), path, lengths=(2, 512), batches=(1, 8))
    run = cd.load(path)
    for tokens in (2, 50, 101):
        ids = inputs_of(name, tokens, batch=3)["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(run(ids).logits, model(ids).logits, rtol=1e-5, atol=2e-6)
