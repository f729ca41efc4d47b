"""Packages of models that are wrapped by compile(model, attention=...)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import compiled_dilated as cd
from compiled_dilated import masks


class Causal(nn.Module):
    """Causal scaled_dot_product_attention of four heads, then FlexAttention with a score_mod."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.slopes = nn.Linear(32, 96), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.project(x).chunk(3, -1))

        def bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return score - self.slopes[h] * (q - kv).abs()

        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return flex_attention(q, k, y, score_mod=bias).transpose(1, 2).flatten(2)


class Encoder(nn.Module):
    """Every way of a graph to attention: a layer of torch with padding, and `Causal`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.causal = Causal()

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.causal(self.layer(x, src_key_padding_mask=padding))


def inputs_of(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Inputs of `Encoder`; the last third of the first sequence is padding."""
    generator = torch.Generator().manual_seed(tokens)
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    padding[0, tokens - tokens // 3 :] = True
    return torch.randn(batch, tokens, 32, generator=generator), padding


def documents(tokens: int, batch: int = 2) -> Tensor:
    """Documents of five tokens, the data of a program."""
    return torch.arange(tokens).expand(batch, -1) // 5


@pytest.mark.usefixtures("fresh")
def test_a_wrapped_model_is_exported_with_its_programs(tmp_path: Path) -> None:
    model = Encoder()
    with torch.no_grad():
        plain = model.eval()(*inputs_of(50))
    program = masks.causal() & masks.window(7) & masks.documents(ids="docs")
    cd.compile(model, attention={"layer.self_attn": cd.longnet((8, 64), (1, 2)), "causal": program})
    model.train()
    model.layer.norm1.eval()  # as a frozen normalization
    about = cd.export(
        model,
        (*inputs_of(50), documents(50)),
        tmp_path / "model.pt2",
        lengths=(1, 4096),
        batches=(1, 8),
    )
    assert [part for part in model.modules() if not part.training] == [model.layer.norm1]
    longnet, causal, _ = about.entries["model"].attention
    assert "segments(64)" in longnet
    assert "padding" in longnet
    assert "window(7" in causal
    assert "docs" in causal
    assert [site.path for site in cd.sites(model)] == ["layer.self_attn", "causal", "causal#2"]
    run = cd.load(tmp_path / "model.pt2")
    model.eval()
    for tokens, batch in ((1, 1), (2, 3), (50, 2), (65, 8), (300, 1)):
        inputs, docs = inputs_of(tokens, batch), documents(tokens, batch)
        with torch.no_grad():
            expected = model(*inputs, data={"docs": docs})
        torch.testing.assert_close(run(*inputs, docs), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(run(*inputs_of(50), documents(50)), plain, atol=1e-3)


def test_a_wrapped_part_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(cd.compile(Causal(), attention=masks.window(7)), nn.Linear(32, 32))
    with pytest.raises(NotImplementedError, match=r"export it by compiled_dilated.export\(model"):
        cd.export(model, (torch.randn(2, 50, 32),), tmp_path / "model.pt2", lengths=(1, 64))
    assert not list(tmp_path.iterdir())


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    model = cd.compile(nn.Sequential(nn.Linear(32, 32)), attention=masks.window(7))
    with pytest.raises(ValueError, match="there is no attention to replace"):
        cd.export(model, (torch.randn(2, 50, 32),), tmp_path / "model.pt2", lengths=(1, 64))
