"""Modules that torch.export captures, and checks of their graphs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attend import Attend
from ..masks import Mask
from ..programs import Program


class Attention(nn.Module):
    """A program as a model of q, k, v and data tensors.

    program: its data tensors follow v, in the order of `program.names`.
    decodes: whether the queries are the last tokens of the cache.
    """

    def __init__(self, program: Program | Mask, decodes: bool = False) -> None:
        super().__init__()
        self.attend, self.decodes = Attend(program), decodes

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *data: Tensor) -> Tensor:
        named = dict(zip(self.attend.program.names, data, strict=True))
        q_offset = k.shape[2] - q.shape[2] if self.decodes else 0
        out: Tensor = self.attend(q, k, v, q_offset=q_offset, data=named or None)
        return out


class Checked(nn.Module):
    """A model whose graph checks its inputs first.

    code: the check, see `Entry.code`.
    """

    def __init__(self, model: nn.Module, code: Sequence[int]) -> None:
        super().__init__()
        self.model, self.code = model, [*code]

    def forward(self, *inputs: Tensor) -> Any:
        passed = torch.ops.compiled_dilated.check_inputs(list(inputs), self.code)
        # Nothing else reads the result, and a compiler drops what nothing reads.
        torch._check(passed.item() >= 1)
        return self.model(*inputs)

    @staticmethod
    def set_code(exported: torch.export.ExportedProgram, code: Sequence[int]) -> None:
        """Replace the check of a graph."""
        check = torch.ops.compiled_dilated.check_inputs.default
        (node,) = [node for node in exported.graph.nodes if node.target is check]
        node.args = (node.args[0], [*code])
        exported.graph_module.recompile()


def attention_of(exported: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Describe the attention calls of a graph: program, heads, kernel."""
    lines = []
    for node in exported.graph.nodes:
        if not _is_attend(node):
            continue
        q, k, v = (node.args[number].meta["val"].shape for number in range(3))
        program, *_, score, _ = json.loads(node.args[5])
        heads = f"{q[1]} query heads on {k[1]} of keys, width {q[3]}"
        if v[3] != q[3]:
            heads += f", values {v[3]}"
        mod = ""
        if score is not None:
            mod = ", with a score_mod"
        kernel = "one call of the native kernel, tiles found at the call"
        if node.args[0].meta["val"].device.type == "cuda":
            kernel = "one launch of the kernel of lanes"
        lines.append(f"{program}{mod}; {heads}; {kernel}")
    return tuple(lines)


def check_graph(exported: torch.export.ExportedProgram) -> None:
    """Raise ValueError if attention on a CPU would need Python."""
    if any(_is_attend(node) for node in exported.graph.nodes):
        raise ValueError(
            "the graph holds attention that the native kernel does not compute for all lengths "
            "(a ring, another lowering, or a function that reads what varies). "
            "Use lowering='auto' without ranks"
        )


def _is_attend(node: torch.fx.Node) -> bool:
    """Whether a node calls the attention operator that is implemented in Python."""
    return node.op == "call_function" and str(node.target).startswith("compiled_dilated.attend")


def read_by_code(exported: torch.export.ExportedProgram) -> list[bool]:
    """For each input, whether generated code reads it with the example's strides."""
    names = exported.graph_signature.user_inputs
    native = torch.ops.compiled_dilated
    # Operators of this package read any strides; a size has none.
    own = (native.native.default, native.check_inputs.default, torch.ops.aten.sym_size.int)
    users = {node.name: node.users for node in exported.graph.nodes if node.op == "placeholder"}
    by_code = []
    for name in names:
        by_code.append(any(user.target not in own for user in users[name]))
    return by_code
