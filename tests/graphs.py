"""Graphs for the tests of passes, and peaks of their runs.

Models are traced to operators.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops import map as map_rows
from torch._higher_order_ops import while_loop
from torch.fx import Graph, GraphModule, Interpreter, Node
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
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and an MLP, both residual and after a norm."""

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
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, dim=-1)
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
    """A small Llama of transformers, from embeddings to logits."""

    def __init__(self) -> None:
        # Imported here, because it takes seconds.
        from transformers import LlamaConfig, LlamaForCausalLM

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
    """A U-Net of two levels, joined by concatenation."""

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
    """Two subgraphs of which one runs; the first has the higher peak."""

    def forward(self, x: Tensor) -> Tensor:
        def wide(t: Tensor) -> Tensor:
            return torch.cat([t, t, t, t]).sin().cos()[: t.shape[0]] + 1

        return torch.cond(x.sum() > -1e9, wide, lambda t: t.cos(), (x,)) * 2


class Loop(nn.Module):
    """Four iterations of a while_loop."""

    def forward(self, x: Tensor) -> Tensor:
        def body(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, (x.sin() + x.cos()).exp()

        return while_loop(lambda i, x: i < 4, body, (torch.zeros((), dtype=torch.int64), x))[1] * 2


class Mapped(nn.Module):
    """A function mapped over rows."""

    def forward(self, x: Tensor) -> Tensor:
        def function(row: Tensor, *_: Any) -> Tensor:
            return row.sin().cos() + 1

        return map_rows(function, x)


def in_place(x: Tensor) -> tuple[Tensor, Tensor]:
    """Write to views and parts of a tensor; use one result.

    The operator of that result has two.
    """
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
    """The gradients of a residual MLP by its input and weights."""
    x, up, down = (tensor.detach().requires_grad_() for tensor in (x, up, down))
    out = x + F.gelu(x @ up) @ down
    return torch.autograd.grad(out.square().mean(), (x, up, down))


@dataclass(frozen=True)
class Traced:
    """A graph of operators, by name.

    trace: returns the graph and its inputs
    exact: no kernel in it has workspace, so that liveness counts its peak exactly
    """

    name: str
    trace: Callable[[], tuple[GraphModule, Sequence[Any]]]
    exact: bool = True

    def __str__(self) -> str:
        return self.name

    @cached_property
    def example(self) -> tuple[GraphModule, Sequence[Any]]:
        """The graph and its inputs, for tests that change neither."""
        return self.trace()


def channels_last(model: nn.Module) -> nn.Module:
    """Convert the weights of a model's convolutions."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def exported(
    model: Callable[[], nn.Module], *shape: int, decomposed: bool = True
) -> tuple[GraphModule, Sequence[Any]]:
    """The graph of a model by torch.export, with its parameters as inputs.

    Images are channels-last: oneDNN's convolutions copy any other layout.

    shape: of the model's input
    decomposed: to core operators
    """
    torch.manual_seed(0)
    module, x = model().eval(), torch.randn(*shape)
    if len(shape) == 4:
        module, x = channels_last(module), x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        program = program.run_decompositions() if decomposed else program
    tensors = {**program.state_dict, **program.constants}
    targets = [spec.target for spec in program.graph_signature.input_specs]
    # Parameters and constants have a target; the model's input has none.
    inputs = []
    for target in targets:
        inputs.append(x if target is None else tensors[target].detach())
    program.graph_module.graph.eliminate_dead_code()
    return program.graph_module, inputs


def functional(function: Callable[..., Any], *inputs: Tensor) -> tuple[GraphModule, Sequence[Any]]:
    """The graph of a function by make_fx, which keeps in-place operators."""
    return make_fx(function, tracing_mode="fake")(*inputs), inputs


def random_dag(seed: int, nodes: int = 30) -> tuple[GraphModule, Sequence[Any]]:
    """Random elementwise operators, products, views and reductions on matrices of several sizes."""
    generator = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    graph = Graph()
    inputs = [torch.randn(32, 8 * (1 + number(8)), generator=generator) for _ in range(2)]
    # The values so far, with their sizes.
    values: list[tuple[Node, int, int]] = []
    for place, tensor in enumerate(inputs):
        values.append((graph.placeholder(f"x{place}"), *tensor.shape))
    for _ in range(nodes):
        # Mostly a recent value, sometimes an old one, which lives longer for it.
        at = max(0, len(values) - 1 - number(4)) if number(3) else number(len(values))
        values.append(_random_call(graph, *values[at], kind=number(5)))
    graph.output(tuple(node for node, _, _ in values[-2:]))
    graph.eliminate_dead_code()
    module = GraphModule({}, graph)
    FakeTensorProp(module).propagate(*inputs)
    return module, inputs


def _random_call(
    graph: Graph, x: Node, rows: int, columns: int, kind: int
) -> tuple[Node, int, int]:
    """Append calls on a matrix x: the result and its sizes."""
    call = graph.call_function
    if kind == 0:
        return call(aten.sin.default, (x,)), rows, columns
    if kind == 1:
        return call(aten.cat.default, ([x, x], 1)), rows, 2 * columns
    if kind == 2:
        half = max(1, columns // 2)
        return call(aten.slice.Tensor, (x, 1, 0, half)), rows, half
    if kind == 3:
        transposed = call(aten.permute.default, (x, [1, 0]))
        return call(aten.mm.default, (transposed, x)), columns, columns
    # The range of each row, from two calls with two results each.
    low = call(operator.getitem, (call(aten.aminmax.default, (x,), {"dim": 1}), 0))
    high = call(operator.getitem, (call(aten.aminmax.default, (x,), {"dim": 1}), 1))
    extent = call(aten.unsqueeze.default, (call(aten.sub.Tensor, (high, low)), 1))
    return call(aten.mul.Tensor, (x, extent)), rows, columns


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
    *(Traced(f"random {seed}", partial(random_dag, seed)) for seed in range(6)),
]


def without_subgraphs(cases: Sequence[Traced]) -> list[Traced]:
    """The graphs that call no subgraphs.

    Inductor and reordering do not take subgraphs apart.
    """
    return [case for case in cases if case.name not in ("branches", "while loop", "map")]


def measured_peak(run: Callable[[], object]) -> int:
    """The peak of torch's allocator during a run.

    It counts from the bytes allocated before the run.
    """
    with torch.no_grad():
        return allocated_bytes(run)


def interpreted(module: GraphModule, inputs: Sequence[Any]) -> Callable[[], object]:
    """Run a graph node by node, freeing dead values at once."""
    return lambda: Interpreter(module, garbage_collect_values=True).run(*inputs)
