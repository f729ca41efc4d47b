"""Packages that decode.

One file has the prefill, and queries against a cache of any length.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import masks
from tests.packaged import Exported, padded, padding, qkv


def test_queries_are_the_last_of_the_cache(package: Exported) -> None:
    run, attend = cd.load(package.path), cd.compile(package.model)
    for tokens, queries in itertools.product((1, 2, 19, 64, 65, 300, 4096), (1, 2, 7, 64)):
        if queries <= tokens:
            inputs, data = qkv(tokens, queries=queries), padding(tokens)
            expected = attend(*inputs, q_offset=tokens - queries, data={"padding": data})
            out = run.decode(*inputs, data)
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_tokens_one_by_one_are_the_whole_sequence(package: Exported) -> None:
    run, (q, k, v), data = cd.load(package.path), qkv(40), padding(40)
    steps = [run(*(x[:, :, :30] for x in (q, k, v)), data[:, :30])]
    # Slices of one allocated cache, without copies.
    for i in range(30, 40):
        query, keys, values = q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1]
        steps.append(run.decode(query, keys, values, data[:, : i + 1]))
    torch.testing.assert_close(torch.cat(steps, dim=2), run(q, k, v, data), rtol=1e-6, atol=1e-6)


def test_a_cache_needs_no_copy(package: Exported) -> None:
    assert not any(x.contiguous for x in package.about.entries["decode"].inputs)


@pytest.mark.parametrize(
    ("tokens", "queries", "message"),
    [
        (3, 9, "queries must be the last of the tokens; got 9 queries of 3 tokens"),
        (3, 0, "queries must be from 1 to 1,048,576, for which the package was made; got 0"),
    ],
)
def test_queries_out_of_range_are_refused(
    package: Exported, tokens: int, queries: int, message: str
) -> None:
    inputs = padded(tokens, queries=queries)
    with pytest.raises(ValueError, match=message):
        cd.load(package.path).decode(*inputs)
    from torch._inductor.package.package import load_package

    with pytest.raises(RuntimeError, match=message):
        load_package(str(package.path), "decode")(*inputs)


class Prefill(nn.Module):
    """A layer over a sequence, which returns output, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = cd.compile(masks.causal() & masks.window(20))
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.heads(x)
        return self.joined(self.attend(q, k, v)), k, v

    def heads(self, x: Tensor) -> list[Tensor]:
        return [y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.project(x).chunk(3, -1)]

    def joined(self, y: Tensor) -> Tensor:
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Step(nn.Module):
    """The same layer over new tokens.

    It returns the extended cache of keys and values.
    """

    def __init__(self, layer: Prefill) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.layer.heads(x)
        past = keys.shape[2]
        keys, values = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
        return self.layer.joined(self.layer.attend(q, keys, values, q_offset=past)), keys, values


@pytest.mark.parametrize("queries", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_model_with_a_cache(tmp_path: Path, queries: int) -> None:
    """One query as example makes an entry for one query.

    Two queries make an entry for any number.
    """
    path, layer, cache = tmp_path / "model.pt2", Prefill(), torch.zeros(2, 4, 9, 8)
    decode = (Step(layer), (torch.zeros(2, queries, 32), cache, cache))
    example = (torch.zeros(2, 50, 32),)
    about = cd.export(layer, example, path, lengths=(2, 4096), decode=decode)
    assert about.entries["decode"].inputs[0].shape == (2, 1 if queries == 1 else "queries", 32)
    run, x = cd.load(path), torch.randn(2, 60, 32)
    out, keys, values = run(x[:, :40])
    outs, step = [out], 1 if queries == 1 else 5
    for i in range(40, 60, step):
        out, keys, values = run.decode(x[:, i : i + step], keys, values)
        outs.append(out)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(outs, dim=1), layer(x)[0], rtol=1e-5, atol=1e-6)


LAYER = Prefill()
ONE_SIZE = (torch.zeros(2, 9, 32),) * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": True, "lengths": None}, "decode needs lengths, the range of the cache's"),
        ({"decode": True, "example_inputs": qkv(2)}, "at least 3 tokens for decode=True; got 2"),
        (
            {"model": LAYER, "decode": (Step(LAYER), ONE_SIZE)},
            r"decode\[1\] must have two sizes of tokens, .*; got \[9\]",
        ),
    ],
)
def test_bad_values_of_decode_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": 1}, "decode must be True or False; got int 1"),
        ({"model": LAYER, "decode": True}, r"must be \(module, example inputs\) .* got bool"),
        (
            {"model": LAYER, "decode": (Step(LAYER), 3)},
            r"decode\[1\] must be a sequence of tensors; got int",
        ),
    ],
)
def test_bad_types_of_decode_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=message):
        export(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def export(folder: Path, **options: Any) -> None:
    """Export a causal mask of a range of lengths.

    Some arguments are replaced.
    """
    settings = {"model": masks.causal(), "example_inputs": qkv(50), "lengths": (1, 99)}
    cd.export(path=folder / "model.pt2", **{**settings, **options})
