"""Graphs of entries: the modules that torch.export captures, and what their graphs say."""

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
    """A program as a model of q, k, v and its data, in the order of names. decodes: q are the last of the tokens."""

    def __init__(self, program: Program | Mask, decodes: bool = False) -> None:
        super().__init__()
        self.attend, self.decodes = Attend(program), decodes

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *data: Tensor) -> Tensor:
        named = dict(zip(self.attend.program.names, data, strict=True))
        q_offset = k.shape[2] - q.shape[2] if self.decodes else 0
        out: Tensor = self.attend(q, k, v, q_offset=q_offset, data=named or None)
        return out


class Checked(nn.Module):
    """A model behind the check of its inputs, which is part of the graph. code: see Entry.code."""

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
        """Put another check in the place of a graph's."""
        (node,) = [
            node
            for node in exported.graph.nodes
            if node.target is torch.ops.compiled_dilated.check_inputs.default
        ]
        node.args = (node.args[0], [*code])
        exported.graph_module.recompile()


def attention_of(exported: torch.export.ExportedProgram) -> tuple[str, ...]:
    """What each attention of a graph computes, and how."""
    lines = []
    for node in exported.graph.nodes:
        if node.op != "call_function" or not str(node.target).startswith("compiled_dilated.attend"):
            continue
        q, k, v = (node.args[number].meta["val"].shape for number in range(3))
        program, *_, score, _ = json.loads(node.args[5])
        heads = f"{q[1]} query heads on {k[1]} of keys, width {q[3]}" + (
            f", values {v[3]}" if v[3] != q[3] else ""
        )
        mod = "" if score is None else ", with a score_mod"
        lines.append(
            f"{program}{mod}; {heads}; one call of the native kernel, tiles found at the call"
        )
    return tuple(lines)


def check_graph(exported: torch.export.ExportedProgram) -> None:
    """Raise ValueError where attention in a graph would need Python."""
    for node in exported.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("compiled_dilated.attend"):
            raise ValueError(
                "the graph holds attention that the native kernel does not compute for all lengths (a ring, another lowering, or "
                "a function that reads what varies). Use lowering='auto' without ranks"
            )


def read_by_code(exported: torch.export.ExportedProgram) -> list[bool]:
    """For each input whether generated code reads it, which takes the strides of the example for granted."""
    names = exported.graph_signature.user_inputs
    native = torch.ops.compiled_dilated
    own = (native.native.default, native.check_inputs.default, torch.ops.aten.sym_size.int)
    users = {node.name: node.users for node in exported.graph.nodes if node.op == "placeholder"}
    return [any(user.target not in own for user in users[name]) for name in names]
