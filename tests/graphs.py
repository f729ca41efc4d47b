"""One table of graphs for the tests of passes/: models traced to operators, and the peak that running them really has."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops import map as map_rows
from torch._higher_order_ops import while_loop
from torch.fx import Graph, GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional as F

from passes.planning.reports import allocated_bytes

aten = torch.ops.aten

WIDTH = 64

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Gelu(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Swiglu(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        sizes = (width, 4 * width), (width, 4 * width), (4 * width, width)
        self.gate, self.up, self.down = (nn.Linear(*each, bias=False) for each in sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and an MLP, both residual, both behind a norm."""

    def __init__(
        self,
        mlp: nn.Module,
        width: int = WIDTH,
        heads: int = 4,
        attend: Attend = F.scaled_dot_product_attention,
    ) -> None:
        super().__init__()
        self.heads, self.mlp, self.attend = heads, mlp, attend
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in self.qkv(self.before(x)).chunk(3, dim=-1)
        )
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, WIDTH, 8, stride=8), nn.Linear(WIDTH, 10)
        self.blocks = nn.Sequential(Block(Gelu()), Block(Gelu()))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(image).flatten(2).transpose(1, 2)).mean(dim=1))


class Llama(nn.Module):
    """That of transformers, from a config, from embeddings to logits."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM  # seconds

        super().__init__()
        self.model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=8 * WIDTH,
                use_cache=False,
            )
        )
        self.model.model.embed_tokens = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x).logits


class Unet(nn.Module):
    """Two levels down and up again, joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.bottom, self.up = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(64, 16, 3, padding=1)
        self.last = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        wide = F.relu(self.first(image))
        middle = F.relu(self.second(F.max_pool2d(wide, 2)))
        low = F.relu(self.bottom(F.max_pool2d(middle, 2)))
        middle = F.relu(self.up(torch.cat([F.interpolate(low, scale_factor=2.0), middle], dim=1)))
        return self.last(torch.cat([F.interpolate(middle, scale_factor=2.0), wide], dim=1))


class Branches(nn.Module):
    """A subgraph of which one of two runs; the first needs most, and so decides."""

    def forward(self, x: Tensor) -> Tensor:
        big = torch.cond(
            x.sum() > -1e9,
            lambda t: torch.cat([t, t, t, t]).sin().cos()[: t.shape[0]] + 1,
            lambda t: t.cos(),
            (x,),
        )
        return big * 2


class Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        def body(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, (x.sin() + x.cos()).exp()

        return while_loop(lambda i, x: i < 4, body, (torch.zeros((), dtype=torch.int64), x))[1] * 2


class Mapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return map_rows(lambda row: row.sin().cos() + 1, x)


def in_place(x: Tensor) -> tuple[Tensor, Tensor]:
    """Views that are written to, results of which one alone is used, a mutated part of something larger."""
    wide = x.repeat(1, 4)
    left, right = wide.split(x.shape[1] * 2, dim=1)
    left.relu_()
    right.mul_(2).add_(left)
    values, _ = wide.topk(8, dim=1)
    wide.view(-1)[:8].zero_()
    return values.exp(), (right.t() @ right).sum(0)


def weights() -> tuple[Tensor, Tensor]:
    return torch.randn(WIDTH, 4 * WIDTH) / 8, torch.randn(4 * WIDTH, WIDTH) / 16


def gradients(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """A training step without its update: the gradients of a residual MLP by all that it takes."""
    given = [each.detach().requires_grad_() for each in (x, up, down)]
    out = given[0] + F.gelu(given[0] @ given[1]) @ given[2]
    return torch.autograd.grad(out.square().mean(), given)


@dataclass(frozen=True)
class Traced:
    """A graph of operators and what it takes. exact: no kernel in it allocates for itself, so the count is the peak."""

    name: str
    make: Callable[[], tuple[GraphModule, Sequence[Any]]]
    exact: bool = True

    def __str__(self) -> str:
        return self.name

    @cached_property
    def made(self) -> tuple[GraphModule, Sequence[Any]]:
        """The graph and its inputs, for tests that change neither."""
        return self.make()


def exported(
    model: Callable[[], nn.Module], *shape: int, decomposed: bool = True
) -> tuple[GraphModule, Sequence[Any]]:
    """The graph of a model as torch.export gives it, its parameters inputs, after decomposition to core operators.

    Images lie channels last: of others, oneDNN's convolutions make a copy for themselves.
    """
    torch.manual_seed(0)
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    built, x = model().eval().to(memory_format=layout), torch.randn(*shape).to(memory_format=layout)
    with torch.no_grad():
        program = torch.export.export(built, (x,))
        program = program.run_decompositions() if decomposed else program
    tensors = {**program.state_dict, **program.constants}
    targets = [spec.target for spec in program.graph_signature.input_specs]
    inputs = [x if target is None else tensors[target].detach() for target in targets]
    program.graph_module.graph.eliminate_dead_code()
    return program.graph_module, inputs


def functional(function: Callable[..., Any], *inputs: Tensor) -> tuple[GraphModule, Sequence[Any]]:
    """The graph of a function as make_fx gives it, operations in place included."""
    return make_fx(function, tracing_mode="fake")(*inputs), inputs


def random_dag(seed: int, nodes: int = 30) -> tuple[GraphModule, Sequence[Any]]:
    """Random elementwise operators, products, views and reductions on matrices of several sizes."""
    generator = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    graph = Graph()
    inputs = [torch.randn(32, 8 * (1 + number(8)), generator=generator) for _ in range(2)]
    made = [(graph.placeholder(f"x{i}"), tuple(each.shape)) for i, each in enumerate(inputs)]
    for _ in range(nodes):
        # Mostly a recent one, sometimes an old one that has to be kept for it.
        at = max(0, len(made) - 1 - number(4)) if number(3) else number(len(made))
        node, (rows, columns) = made[at]
        kind = number(5)
        if kind == 0:
            made.append((graph.call_function(aten.sin.default, (node,)), (rows, columns)))
        elif kind == 1:
            made.append(
                (graph.call_function(aten.cat.default, ([node, node], 1)), (rows, 2 * columns))
            )
        elif kind == 2:
            made.append(
                (
                    graph.call_function(aten.slice.Tensor, (node, 1, 0, max(1, columns // 2))),
                    (rows, max(1, columns // 2)),
                )
            )
        elif kind == 3:
            transposed = graph.call_function(aten.permute.default, (node, [1, 0]))
            made.append(
                (graph.call_function(aten.mm.default, (transposed, node)), (columns, columns))
            )
        else:
            low, high = (
                graph.call_function(
                    operator.getitem,
                    (graph.call_function(aten.aminmax.default, (node,), {"dim": 1}), i),
                )
                for i in (0, 1)
            )
            both = graph.call_function(aten.sub.Tensor, (high, low))
            made.append(
                (
                    graph.call_function(
                        aten.mul.Tensor,
                        (node, graph.call_function(aten.unsqueeze.default, (both, 1))),
                    ),
                    (rows, columns),
                )
            )
    graph.output(tuple(node for node, _ in made[-2:]))
    graph.eliminate_dead_code()
    module = GraphModule({}, graph)
    FakeTensorProp(module).propagate(*inputs)
    return module, inputs


CASES = [
    Traced("gelu mlp", lambda: exported(Gelu, 2, 256, WIDTH)),
    Traced("swiglu mlp", lambda: exported(Swiglu, 2, 256, WIDTH)),
    Traced("gelu block", lambda: exported(lambda: Block(Gelu()), 2, 256, WIDTH), exact=False),
    Traced("swiglu block", lambda: exported(lambda: Block(Swiglu()), 2, 256, WIDTH), exact=False),
    Traced(
        "four blocks",
        lambda: exported(lambda: nn.Sequential(*(Block(Gelu()) for _ in range(4))), 1, 512, WIDTH),
        exact=False,
    ),
    Traced("vit", lambda: exported(Vit, 2, 3, 128, 128), exact=False),
    Traced("llama", lambda: exported(Llama, 1, 256, WIDTH), exact=False),
    Traced("unet", lambda: exported(Unet, 2, 3, 64, 64), exact=False),
    Traced("gelu mlp as exported", lambda: exported(Gelu, 2, 256, WIDTH, decomposed=False)),
    Traced(
        "gelu block as exported",
        lambda: exported(lambda: Block(Gelu()), 2, 1024, WIDTH, decomposed=False),
        exact=False,
    ),
    Traced(
        "gelu mlp, forward and backward",
        lambda: functional(gradients, torch.randn(512, WIDTH), *weights()),
        exact=False,
    ),
    Traced("branches", lambda: exported(Branches, 256, WIDTH), exact=False),
    Traced("while loop", lambda: exported(Loop, 8, 64, WIDTH), exact=False),
    Traced("map", lambda: exported(Mapped, 8, 64, WIDTH), exact=False),
    Traced("in place", lambda: functional(in_place, torch.randn(256, WIDTH)), exact=False),
    *(Traced(f"random {seed}", lambda seed=seed: random_dag(seed)) for seed in range(6)),
]


def measured_peak(run: Callable[[], object]) -> int:
    """The most bytes that torch's allocator held at once during a run beyond those before it, by the profiler's memory events."""
    with torch.no_grad():
        return allocated_bytes(run)


def interpreted(module: GraphModule, inputs: Sequence[Any]) -> Callable[[], object]:
    """The graph run node by node, dead values freed at once."""
    return lambda: Interpreter(module, garbage_collect_values=True).run(*inputs)
