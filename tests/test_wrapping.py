"""Models that know nothing of us, wrapped in place: they compute what they computed, or what a program says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import compiled_dilated as cd
from compiled_dilated import masks
from compiled_dilated.wrapping import graphs

HEADS, WIDTH = 4, 64


class Block(nn.Module):
    """q, k and v from one layer, scaled_dot_product_attention, and a layer behind it."""

    def __init__(self, kv_heads: int = HEADS, dropout: float = 0.0) -> None:
        super().__init__()
        self.kv_heads, self.dropout = kv_heads, dropout
        head = WIDTH // HEADS
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * kv_heads * head)
        self.out, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x_normal = self.norm(x)
        q = self.q(x_normal).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (
            y.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
            for y in self.kv(x_normal).chunk(2, -1)
        )
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout,
            is_causal=mask is None,
            enable_gqa=self.kv_heads != HEADS,
        )
        return x + self.out(y.transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, checkpointed: bool = False, **settings: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(**settings) for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = (
                checkpoint(block, x, mask, use_reentrant=False)
                if self.checkpointed
                else block(x, mask)
            )
        return x


class Multihead(nn.Module):
    """nn.MultiheadAttention as people call it; weights: whether they read those."""

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.attention(x, x, x)
        return out + weights.sum() if self.weights else out


def aot_eager(graph: Any, inputs: Any) -> Any:
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def wrapped(
    model: nn.Module, attention: Any = None, backend: Any = aot_eager
) -> tuple[nn.Module, nn.Module]:
    """The model wrapped, and as it was."""
    torch._dynamo.reset()
    plain = copy.deepcopy(model)
    return graphs.wrap(model, attention, None, backend), plain


def gradients(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    model.zero_grad()
    model(*args, **kwargs).square().mean().backward()
    return torch.cat(
        [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    )


def assert_same(ours: nn.Module, plain: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Results and gradients."""
    torch.testing.assert_close(ours(*args, **kwargs), plain(*args, **kwargs), rtol=1e-5, atol=5e-6)
    want = gradients(plain, *args, **kwargs)
    assert (gradients(ours, *args, **kwargs) - want).norm() <= 1e-5 * want.norm()


X = torch.randn(2, 50, WIDTH, generator=torch.Generator().manual_seed(1))
SEEN = torch.rand(2, 1, 50, 50, generator=torch.Generator().manual_seed(2)) > 0.3
MASKS = {
    "causal": None,
    "padding": torch.arange(50)[None, None, None] < torch.tensor([50, 31])[:, None, None, None],
    "of pairs": SEEN,
    "of pairs and heads": SEEN.expand(2, HEADS, 50, 50),
    "two dimensions": SEEN[0, 0],
    "bias": torch.randn(1, HEADS, 50, 50, generator=torch.Generator().manual_seed(3)),
    "bias of -inf": torch.zeros(2, 1, 50, 50).masked_fill(~SEEN, -torch.inf),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_without_programs_a_model_computes_what_it_did(mask: Tensor | None) -> None:
    assert_same(*wrapped(Net()), X, mask)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_and_checkpoints(kv_heads: int, checkpointed: bool) -> None:
    ours, plain = wrapped(Net(checkpointed, kv_heads=kv_heads))
    assert_same(ours, plain, X)
    assert [site.path for site in cd.sites(ours)] == ["blocks.0", "blocks.1"]


TORCHS: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 96, 0.0, batch_first=True), 2
    ),
    "multihead": Multihead,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TORCHS)
def test_modules_of_torch(name: str, training: bool) -> None:
    ours, plain = wrapped(TORCHS[name]().train(training))
    assert_same(ours, plain, X)
    with torch.no_grad():
        torch.testing.assert_close(ours(X), plain(X), rtol=1e-5, atol=5e-6)
    assert len(cd.sites(ours)) == (2 if name == "encoder" else 1)
    assert "not called" not in repr(cd.sites(ours))


def test_masks_of_an_encoder() -> None:
    ours, plain = wrapped(TORCHS["encoder"]())
    padding = torch.arange(50)[None] >= torch.tensor([50, 31])[:, None]
    causal = nn.Transformer.generate_square_subsequent_mask(50)
    for options in (
        {"src_key_padding_mask": padding},
        {"mask": causal, "is_causal": True},
        {"mask": causal, "is_causal": False},
    ):
        assert_same(ours, plain, X, **options)
    assert_same(
        ours,
        plain,
        X,
        mask=causal,
        is_causal=False,
        src_key_padding_mask=padding.float().masked_fill(padding, -torch.inf),
    )


def test_an_encoder_and_decoder() -> None:
    ours, plain = wrapped(nn.Transformer(WIDTH, HEADS, 1, 1, 96, 0.0, batch_first=True))
    assert_same(ours, plain, X, X[:, :33])
    kinds = [site.path for site in cd.sites(ours)]
    assert kinds == [
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    ]


PROGRAMS = {
    "longnet": cd.longnet((16, 32), (1, 2), causal=True),
    "window": masks.causal() & masks.window(9),
}


class Written(Net):
    """Net as its user would write it with a program."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.attend = cd.compile(program)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            y = block.norm(x)
            q = block.q(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            k, v = (z.unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in block.kv(y).chunk(2, -1))
            x = x + block.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_replaces_a_causal_call(program: Any) -> None:
    net = Net()
    written = Written(program)
    written.load_state_dict(net.state_dict())
    ours, _ = wrapped(net, program)
    assert_same(ours, written, X)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TORCHS)
def test_a_program_in_modules_of_torch(name: str, training: bool) -> None:
    ours, plain = wrapped(TORCHS[name]().train(training), masks.window(3))
    places = torch.arange(50)
    hidden = (places[:, None] - places).abs() > 3
    masked = isinstance(plain, Multihead)
    want = plain.attention(X, X, X, attn_mask=hidden)[0] if masked else plain(X, mask=hidden)
    torch.testing.assert_close(ours(X), want, rtol=1e-5, atol=5e-6)
    assert not torch.allclose(ours(X), plain(X), atol=1e-3)


def test_caches_of_graphs_know_programs() -> None:
    """Twice with inductor, whose caches on disk hold the first run's graphs."""
    places = torch.arange(50)
    for _ in range(2):
        for radius in (3, 9):
            torch.manual_seed(0)
            encoder = TORCHS["encoder"]().eval()
            plain = copy.deepcopy(encoder)
            torch._dynamo.reset()
            with torch.no_grad():
                out = cd.compile(encoder, attention=masks.window(radius))(X)
                want = plain(X, mask=(places[:, None] - places).abs() > radius)
            torch.testing.assert_close(out, want, rtol=1e-5, atol=5e-6)


def test_a_program_is_joined_with_the_mask_of_a_call() -> None:
    net = Net()
    written = Net()
    written.load_state_dict(net.state_dict())
    ours, _ = wrapped(net, masks.window(9))
    places = torch.arange(50)
    window = (places[:, None] - places).abs() <= 9
    for mask in (MASKS["padding"], SEEN, SEEN[0, 0]):
        torch.testing.assert_close(ours(X, mask), written(X, mask & window), rtol=1e-5, atol=5e-6)


def test_programs_by_path() -> None:
    everywhere, plain = wrapped(Net(), PROGRAMS["window"])
    one, _ = wrapped(copy.deepcopy(plain), {"blocks.0": PROGRAMS["window"]})
    same, _ = wrapped(
        copy.deepcopy(plain), lambda layer: PROGRAMS["window"] if layer.path == "blocks.0" else None
    )
    assert torch.equal(one(X), same(X))
    assert not torch.allclose(one(X), everywhere(X))
    assert [site.program is None for site in cd.sites(one)] == [False, True]


def test_ten_lengths_are_two_graphs() -> None:
    for mask_of in (lambda n: None, lambda n: SEEN[:, :, :1, :1].expand(2, 1, n, n)):
        counter = CompileCounterWithBackend("aot_eager")
        ours, plain = wrapped(Net(), backend=counter)
        for length in (50, 33, 61, 77, 100, 123, 64, 128, 40, 200):
            x, mask = torch.randn(2, length, WIDTH), mask_of(length)
            with torch.no_grad():
                torch.testing.assert_close(ours(x, mask), plain(x, mask), rtol=1e-5, atol=5e-6)
        assert counter.frame_count <= 2


def test_a_wrapped_model_stays_itself() -> None:
    net = Net()
    names = list(net.state_dict())
    torch._dynamo.reset()
    ours = cd.compile(net, attention=PROGRAMS["longnet"])  # inductor, as users have it
    assert ours is net
    assert list(net.state_dict()) == names
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = ours(X)
    torch.testing.assert_close(lower.float(), ours(X), rtol=0.05, atol=0.05)


class Bare(nn.Module):
    """scaled_dot_product_attention alone."""

    def forward(self, q: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


Q = torch.randn(2, 3, HEADS, 20, 16, generator=torch.Generator().manual_seed(4))
FIVE = {
    "of batches": (2, 1, 1, 20, 20),
    "of the inner batch": (1, 3, 1, 20, 20),
    "four dimensions": (3, HEADS, 20, 20),
    "keys": (3, 1, 1, 20),
    "one key": (2, 1, 1, 1, 1),
}


@pytest.mark.parametrize("shape", FIVE.values(), ids=FIVE)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks_of_any_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = torch.randn(shape) > -0.5 if dtype == torch.bool else torch.randn(shape)
    for q in (Q, Q[0], Q[0, 0]):
        if len(shape) > q.dim():
            continue
        part = mask[: q.shape[0]] if len(shape) == q.dim() == 3 else mask
        ours, plain = wrapped(Bare())
        torch.testing.assert_close(ours(q, part), plain(q, part), rtol=1e-5, atol=5e-6)


def test_three_dimensions_are_a_batch() -> None:
    for mask in (
        torch.rand(3, 20, 20) > 0.3,
        torch.rand(3, 1, 20) > 0.3,
        torch.randn(3, 20, 20).requires_grad_(),
    ):
        ours, plain = wrapped(Bare())
        assert_gradient(ours, plain, Q[0, :, 0].clone().requires_grad_(), mask)


def assert_gradient(ours: nn.Module, plain: nn.Module, *inputs: Tensor) -> None:
    learned = [x for x in inputs if x.requires_grad]
    for grad, want in zip(
        *(torch.autograd.grad(model(*inputs).square().sum(), learned) for model in (ours, plain)),
        strict=True,
    ):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)


def test_many_models_and_many_calls() -> None:
    for _ in range(11):
        ours = graphs.wrap(Bare(), masks.window(3), None, aot_eager)
        torch.testing.assert_close(
            ours(Q[0]), cd.compile(masks.window(3))(Q[0], Q[0], Q[0]), rtol=1e-5, atol=5e-6
        )

    class Modes(nn.Module):
        def forward(self, q: Tensor, mode: str) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q) + len(mode)

    ours, _ = wrapped(Modes(), masks.window(3))
    # Never silently without the program.
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):  # noqa: PT012
        for number in range(20):
            ours(Q[0], "m" * number)


def test_copies_and_pickles_stay_wrapped(tmp_path: Any) -> None:
    ours, _ = wrapped(Net(), PROGRAMS["window"])
    want = ours(X)
    again = copy.deepcopy(ours)
    torch.save(ours, tmp_path / "model")
    for model in (again, torch.load(tmp_path / "model", weights_only=False)):
        assert torch.equal(model(X), want)
        with torch.no_grad():
            model.blocks[0].out.weight.zero_()
        assert not torch.equal(model(X), want)
    assert torch.equal(ours(X), want)
    assert torch.equal(ours.forward(X), want)


def test_a_model_may_be_wrapped_again_but_not_a_part() -> None:
    ours, plain = wrapped(Net(), PROGRAMS["window"])
    first = ours(X)
    graphs.wrap(ours, None, None, aot_eager)
    torch.testing.assert_close(ours(X), plain(X), rtol=1e-5, atol=5e-6)
    graphs.wrap(ours, PROGRAMS["window"], None, aot_eager)
    assert torch.equal(ours(X), first)
    with pytest.raises(ValueError, match="0 of Sequential is wrapped already"):
        graphs.wrap(nn.Sequential(ours), None, None, aot_eager)


def test_two_calls_of_a_module_are_two_sites() -> None:
    class Twice(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            q = F.scaled_dot_product_attention(q, q, q)
            return F.scaled_dot_product_attention(q, q, q)

    ours, _ = wrapped(Twice(), lambda layer: masks.window(3) if layer.path.endswith("#2") else None)
    first = cd.compile(masks.full())(Q[0], Q[0], Q[0])
    torch.testing.assert_close(
        ours(Q[0]), cd.compile(masks.window(3))(first, first, first), rtol=1e-5, atol=5e-6
    )
    assert [site.path for site in cd.sites(ours)] == ["", "#2"]


def test_a_padded_mask_that_is_called_causal_and_is_not() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, 0.0, batch_first=True)
    ours, plain = wrapped(layer)
    places = torch.arange(50)
    window = torch.zeros(50, 50).masked_fill((places[:, None] - places).abs() > 5, -torch.inf)
    assert_same(
        ours, plain, X, src_mask=window, src_key_padding_mask=torch.zeros(2, 50), is_causal=True
    )


def test_a_mask_that_is_called_causal_and_is_not() -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(
                WIDTH, HEADS, batch_first=True, add_zero_attn=True
            )

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.ones(50, 50).triu(1).bool()
            return self.attention(x, x, x, attn_mask=hidden, is_causal=True)[0]

    assert_same(*wrapped(Zero()), X)


# Refusals ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "attention", "error", "message"),
    [
        (
            nn.Linear(WIDTH, WIDTH),
            None,
            ValueError,
            "Linear called no scaled_dot_product_attention",
        ),
        (
            Net(dropout=0.1),
            None,
            NotImplementedError,
            r"dropout of attention weights \(0.1\) is not computed \(File .*wrapping",
        ),
        (
            Multihead(weights=True),
            None,
            NotImplementedError,
            r"weights as a result are not made \(File .*test_wrapping",
        ),
        (
            Net(),
            cd.local_window(9),
            ValueError,
            "blocks.0 is causal, and its program shows later keys",
        ),
        (
            Net(),
            {"layers.*": masks.causal()},
            ValueError,
            r"no layer matches 'layers.\*'. The layers: blocks, blocks.0",
        ),
        (
            Net(),
            lambda layer: 3,
            TypeError,
            "attention of blocks.0 must be a program, a mask or None; got int 3",
        ),
    ],
    ids=["no attention", "dropout", "weights", "not causal", "pattern", "function"],
)
def test_what_is_not_computed_is_refused(
    model: nn.Module, attention: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):  # noqa: PT012
        ours, _ = wrapped(model.train(), attention)
        ours(X)


def test_what_is_refused_at_once() -> None:
    with pytest.raises(
        TypeError, match="attention must be a program, a mask, a function of a layer or"
    ):
        cd.compile(Net(), attention=3)
    with pytest.raises(ValueError, match="memory_budget must be a number and one of B, KiB"):
        cd.compile(Net(), attention=None, memory_budget="much")
    with pytest.raises(ValueError, match="attention, memory_budget and dynamic are for models"):
        cd.compile(masks.causal(), attention=masks.causal())
    with pytest.raises(ValueError, match="Linear has no sites; wrap it first"):
        cd.sites(nn.Linear(2, 2))


def test_what_would_leave_the_program_out_is_refused() -> None:
    ours, _ = wrapped(Net(), PROGRAMS["window"])
    want = ours(X)
    with pytest.raises(Exception, match="would leave that out"):
        torch.export.export(ours, (X,))
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(RuntimeError, match="without compiling it"),
    ):
        ours(X)
    # A compiler around it runs it as it is.
    assert torch.equal(torch.compile(ours, backend="eager")(X), want)

    class Hidden(nn.Module):
        @torch.compiler.disable
        def rest(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

        def forward(self, q: Tensor) -> Tensor:
            return self.rest(F.scaled_dot_product_attention(q, q, q))

    hidden, _ = wrapped(Hidden(), masks.window(3))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        hidden(Q[0])
