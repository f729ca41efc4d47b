"""Programs that read data, in models of any kind: model(x, data={name: tensor})."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.wrapping import graphs
from tests.support.wrapped import (
    MODULES,
    SEEN,
    TOKENS,
    WIDTH,
    Net,
    Q,
    X,
    assert_close,
    assert_same,
    wrapped,
)

DOCUMENTS = torch.arange(TOKENS)[None] // torch.tensor([[9], [14]])
# The name is that which a mask of the model's own would get.
PROGRAM = masks.documents(ids="documents")
DATA = {"documents": DOCUMENTS}


def same_document(documents: Tensor = DOCUMENTS) -> Tensor:
    """(2, 1, tokens, tokens)."""
    return documents[:, None, :, None] == documents[:, None, None, :]


class Called(nn.Module):
    """A plain model, called with the masks that data and program stand for."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor, mask: Tensor | None = None, data: Any = None) -> Tensor:
        allowed = same_document(data["documents"])
        if mask is None:
            mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        out: Tensor = self.plain(x, allowed & mask)
        return out


@pytest.mark.parametrize("checkpointed", [False, True])
def test_data_of_a_call_joins_its_mask(checkpointed: bool) -> None:
    model, plain = wrapped(Net(checkpointed), masks.causal() & PROGRAM)
    expected = Called(plain)
    assert_same(model, expected, X, data=DATA)
    # The mask of the call is data of its own.
    assert_same(model, expected, X, SEEN & torch.ones(TOKENS, TOKENS).tril().bool(), data=DATA)


def test_the_models_own_documents_are_other_data() -> None:
    halves = (torch.arange(TOKENS)[None] // 20).expand(2, -1)

    class Halves(Net):
        def forward(self, x: Tensor, halves: Tensor | None = None) -> Tensor:
            assert halves is not None
            return super().forward(x, halves[:, None, :, None] == halves[:, None, None, :])

    model, plain = wrapped(Halves(), PROGRAM)
    both = same_document() & same_document(halves)
    expected = Net.forward(plain, X, both)  # type: ignore[arg-type]
    assert_close(model(X, halves, data=DATA), expected)
    (site, _) = cd.sites(model)
    assert "documents(ids='documents') & documents(ids='documents2')" in repr(site.last.attend)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", MODULES)
def test_data_in_modules_of_torch(name: str) -> None:
    model, plain = wrapped(MODULES[name](), PROGRAM)
    with torch.no_grad():
        hidden = ~same_document().expand(2, 4, -1, -1).flatten(0, 1)
        if name == "encoder":
            expected = plain(X, mask=hidden)
        else:
            expected = plain.attention(X, X, X, attn_mask=hidden)[0]  # type: ignore[operator]
        assert_close(model(X, data=DATA), expected)


class Flex(nn.Module):
    """flex_attention of the same queries, keys and values."""

    def forward(self, q: Tensor) -> Tensor:
        out: Tensor = flex_attention(q, q, q)
        return out


def test_data_in_flex_attention() -> None:
    model, _ = wrapped(Flex(), PROGRAM)
    documents = torch.arange(20)[None] // 6
    expected = cd.compile(PROGRAM)(Q[0], Q[0], Q[0], data={"documents": documents})
    assert_close(model(Q[0], data={"documents": documents}), expected)


def test_ten_lengths_with_data_are_two_graphs() -> None:
    torch._dynamo.reset()
    backend: Any = CompileCounterWithBackend("aot_eager")
    plain = Net()
    model = graphs.wrap(copy.deepcopy(plain), masks.causal() & PROGRAM, None, backend)
    for length in (50, 33, 61, 77, 100, 123, 64, 128, 40, 200):
        x, documents = torch.randn(2, length, WIDTH), torch.arange(length)[None] // 9
        seen = same_document(documents) & torch.ones(length, length, dtype=torch.bool).tril()
        assert_close(model(x, data={"documents": documents}), plain(x, seen))
    assert 1 <= backend.frame_count <= 2


class OwnData(Net):
    """A model with an argument `data` of its own."""

    def forward(self, x: Tensor, data: Tensor | None = None) -> Tensor:
        return super().forward(x, data)


# The model, its program, the call's keywords, and the error with its message.
BAD_CALLS: dict[str, tuple[nn.Module, Any, dict[str, Any], type[Exception], str]] = {
    "none": (
        Net(),
        masks.causal() & PROGRAM,
        {},
        ValueError,
        r"the programs of Net read the data tensors \['documents'\]; got \[\]. Pass data=",
    ),
    "another name": (
        Net(),
        masks.causal() & PROGRAM,
        {"data": {**DATA, "other": DOCUMENTS}},
        ValueError,
        r"read the data tensors \['documents'\]; got \['documents', 'other'\]",
    ),
    "without a program of data": (
        Net(),
        masks.causal(),
        {"data": DATA},
        ValueError,
        r"the programs of Net read the data tensors \[\]; got \['documents'\]",
    ),
    "no dict": (
        Net(),
        masks.causal() & PROGRAM,
        {"data": DOCUMENTS},
        TypeError,
        "data must be a dict of tensors by name; got Tensor",
    ),
    "no tensor": (
        Net(),
        masks.causal() & PROGRAM,
        {"data": {"documents": 3}},
        TypeError,
        r"data\['documents'\] must be a bool or integer tensor; got int",
    ),
    "too few tokens": (
        Net(),
        masks.causal() & PROGRAM,
        {"data": {"documents": DOCUMENTS[:, :40]}},
        ValueError,
        r"data\['documents'\] must be \(batch or 1, tokens\) .* at least 50 tokens; got .*40",
    ),
    "an argument of the model's own": (
        OwnData(),
        masks.causal() & PROGRAM,
        {"data": SEEN},
        ValueError,
        "the forward of OwnData has an argument 'data' of its own, by which",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_data_is_refused(case: str) -> None:
    model, program, keywords, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):  # noqa: PT012
        wrapped_model, _ = wrapped(model, program)
        wrapped_model(X, **keywords)


def test_a_models_own_argument_is_passed_to_it() -> None:
    model, plain = wrapped(OwnData(), masks.full())
    assert_close(model(X, data=SEEN), plain(X, SEEN))
