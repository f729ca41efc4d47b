"""One measurement of the report: its call, inputs and row."""

from __future__ import annotations

import copy
import json
import math
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import compiled_dilated as cd
from compiled_dilated import measure, text
from compiled_dilated.heads import HeadRange
from compiled_dilated.ring.checking import exact_row
from compiled_dilated.variants import variant

from .peers import PEERS, RATES, SEGMENTS, swapped

Row = dict[str, Any]

# Up to so many tokens every row is compared with float64, beyond it so many of them.
_WHOLE_REFERENCE_TOKENS, _SAMPLED_ROWS = 2048, 16
ALL_ROWS = "all rows"
# Of a process, for its code and libraries, beside the tensors that a plan counts.
_BESIDE_TENSORS_BYTES = 2**30


@dataclass(frozen=True)
class Job:
    """One measurement.

    suite: the question that it belongs to.
    kind: "variant" (a name of the older reports), "program" (an expression under cd.compile),
        "peer" (a name of PEERS), "limit" (a plan within settings["gib"] GiB), or "billion"
        (`compiled-dilated ring billion`).
    way: the variant's, peer's or row's name.
    program: the expression of kind "program", "limit" and "billion".
    tokens, batch, heads, head_dim, dtype: of q, k and v.
    ranks: of a simulated ring; 1 for none. A variant's name states its own.
    settings: keyword arguments of a peer.
    backward: whether gradients of q, k and v are computed as well.
    turns, seconds: no further call starts after `turns` calls or this time.
    """

    suite: str
    kind: str
    way: str
    tokens: int
    program: str = ""
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    ranks: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    backward: bool = False
    turns: int = 5
    seconds: float = 20.0
    threads: int = 2

    @property
    def name(self) -> str:
        """The row's name in progress and tables."""
        passes = "forward + backward" if self.backward else "forward"
        size = f"{self.tokens:,} tokens"
        if self.kind == "limit":
            size = f"{self.settings['gib']} GiB"
        return f"{self.way}, {size}, {self.dtype}, {passes}"

    @property
    def key(self) -> str:
        """The job as text, equal for equal jobs."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, tokens, head_dim) of q, k and v."""
        return self.batch, self.heads, self.tokens, self.head_dim


@dataclass(frozen=True)
class Subject:
    """The call of a job, its inputs, and its expected output.

    inputs: q, k and v as the call takes them, or the one input of a multihead module.
    call: computes the output from the inputs.
    program: the program that the output is compared with; None where it is compared otherwise.
    bhnd: brings a tensor of the call to (batch, heads, tokens, head_dim).
    exact: computes the output, all rows, from the inputs in float64; None to compute it from the
        program.
    """

    inputs: list[Tensor]
    call: Callable[..., Tensor]
    program: cd.Program | None
    bhnd: Callable[[Tensor], Tensor]
    exact: Callable[..., Tensor] | None = None

    def in_float64(self, *inputs: Tensor) -> Tensor:
        """The dense output (batch, heads, tokens, head_dim) of inputs in float64."""
        if self.exact is not None:
            return self.exact(*inputs)
        assert self.program is not None
        return cd.reference(self.program, *map(self.bhnd, inputs))


def row_of(job: Job) -> Row:
    """Measure a job in this process.

    The row has seconds, peak bytes, the error against float64, and the plan's counts.
    """
    torch.set_num_threads(job.threads)
    if job.kind == "billion":
        return _billion(job)
    if job.kind == "limit":
        return _limit(job)
    subject = _subject(job)
    call = _call(job, subject)
    # The first call plans and compiles; the peak and the times are of later calls.
    row: Row = {"first_seconds": measure.timed(call)}
    seconds, row["peak_bytes"] = measure.seconds_and_peak_bytes(call)
    row["seconds"] = [seconds] if seconds > job.seconds else _times(call, job)
    with torch.no_grad():
        row |= _error(job, subject, subject.call(*subject.inputs))
    if job.backward and row["compared"] == ALL_ROWS:
        row |= _gradient_error(subject)
    if subject.program is not None:
        row |= _counts(job, subject.program)
    return row


def _call(job: Job, subject: Subject) -> Callable[[], object]:
    """The forward of a job, or its forward and backward."""

    def forward() -> Tensor:
        with torch.no_grad():
            return subject.call(*subject.inputs)

    def forward_and_backward() -> None:
        out = subject.call(*subject.inputs)
        torch.autograd.grad(out.sum(), subject.inputs)

    if not job.backward:
        return forward
    for x in subject.inputs:
        x.requires_grad_()
    return forward_and_backward


def _times(call: Callable[[], object], job: Job) -> list[float]:
    """Seconds of each call, within the job's turns and time."""
    started = time.perf_counter()
    times = [measure.timed(call)]
    while len(times) < job.turns and time.perf_counter() - started < job.seconds:
        times.append(measure.timed(call))
    return times


# What is called -----------------------------------------------------------------------------


def _subject(job: Job) -> Subject:
    """The call of a job and its inputs, equal in every process."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, job.dtype)
    if job.kind == "variant" and "Multihead" in job.way:
        shape = (job.batch, job.tokens, job.heads * job.head_dim)
        return _multihead(job, torch.randn(shape, generator=generator, dtype=dtype))
    if job.kind == "variant":
        module = variant(job.way, **_arguments(job))
        shape = (job.batch, job.tokens, job.heads, job.head_dim)
        inputs = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]
        return Subject(inputs, module, module.program(job.tokens), _swapped)
    q, k, v = (torch.randn(job.shape, generator=generator, dtype=dtype) for _ in range(3))
    if job.kind == "peer":
        peer = PEERS[job.way]
        call, program = peer.build(job.tokens, job.head_dim, **job.settings)
        return Subject([q, k, v], call, program, _same)
    program = text.read_program(job.program)
    if job.ranks > 1:
        return Subject([q, k, v], cd.compile(program, ranks=job.ranks), program, _same)
    return Subject([q, k, v], cd.compile(program), program, _same)


def _same(x: Tensor) -> Tensor:
    return x


def _swapped(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _arguments(job: Job) -> dict[str, Any]:
    """The constructor's arguments of a variant."""
    if "BlockSparse" in job.way:
        return dict(job.settings)
    return {"segment_lengths": SEGMENTS, "dilation_rates": RATES} | job.settings


def _multihead(job: Job, x: Tensor) -> Subject:
    """A module with projections; in float64 its attention is the reference."""
    torch.manual_seed(0)
    arguments = _arguments(job) | {"embed_dim": x.shape[2], "num_heads": job.heads}
    module = variant(job.way, **arguments).to(x.dtype)
    program = module.attention.program(job.tokens)

    def bhnd(out: Tensor) -> Tensor:
        return out.unflatten(2, (job.heads, -1)).transpose(1, 2)

    def exact(x: Tensor) -> Tensor:
        judge = copy.deepcopy(module).double()
        judge.attention = _Reference(program)
        return bhnd(judge(x, x, x)[0])

    return Subject([x], lambda x: module(x, x, x)[0], program, bhnd, exact)


class _Reference(nn.Module):
    """The dense float64 reference in the place of a module's attention."""

    def __init__(self, program: cd.Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attention over (batch, tokens, heads, head_dim)."""
        q, k, v = swapped(query, key, value)
        return cd.reference(self.program, q, k, v).transpose(1, 2)


# What the output is compared with -----------------------------------------------------------


class _Rows:
    """A tensor as the source of rows that `exact_row` reads."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape, self.dtype = x.detach(), tuple(x.shape), x.dtype

    def read_into(self, out: Tensor, heads: HeadRange, rows: range) -> None:
        """Copy some rows."""
        index = torch.arange(rows.start, rows.stop, rows.step)
        of_heads = self.x[:, heads.start :: heads.step][:, : heads.count]
        out.copy_(of_heads[:, :, index])


def _error(job: Job, subject: Subject, out: Tensor) -> Row:
    """The largest difference from float64, and the rows compared.

    It is a share of the largest number.
    """
    out = subject.bhnd(out.detach())
    if job.tokens <= _WHOLE_REFERENCE_TOKENS:
        exact = subject.in_float64(*(x.detach().double() for x in subject.inputs))
        return _difference(out, exact, ALL_ROWS)
    if subject.program is None or subject.exact is not None:
        return {"error": None, "has_nan": False, "compared": "nothing"}
    q, k, v = (subject.bhnd(x.detach()) for x in subject.inputs)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(job.tokens, (_SAMPLED_ROWS,), generator=generator).tolist()
    sources = [_Rows(x) for x in (q, k, v)]
    scale = job.head_dim**-0.5
    exact = torch.stack([exact_row(subject.program, *sources, row, scale) for row in rows], dim=2)
    # A whole result of the longest sequences would not fit into memory in float64.
    return _difference(out[:, :, rows], exact, f"{len(rows)} rows")


def _gradient_error(subject: Subject) -> Row:
    """The largest difference of gradients from float64's.

    It is a share of a gradient's largest number.
    """
    inputs = [x.detach().double().requires_grad_() for x in subject.inputs]
    exact = torch.autograd.grad(subject.in_float64(*inputs).sum(), inputs)
    gradients = torch.autograd.grad(subject.call(*subject.inputs).sum(), subject.inputs)
    errors = []
    for gradient, expected in zip(gradients, exact, strict=True):
        errors.append((gradient.double() - expected).abs().max() / expected.abs().max())
    # NaN if one is: Python's max may lose it.
    error = torch.stack(errors).max().item()
    if not math.isfinite(error):
        return {"gradient_error": None, "has_nan": True}
    return {"gradient_error": error}


def _difference(out: Tensor, exact: Tensor, compared: str) -> Row:
    difference = (out.double() - exact).abs().max().item() / exact.abs().max().item()
    # A result with NaN is no number of JSON.
    if not math.isfinite(difference):
        return {"error": None, "has_nan": True, "compared": compared}
    return {"error": difference, "has_nan": False, "compared": compared}


def _counts(job: Job, program: cd.Program) -> Row:
    """The plan's pairs, tiles, operations and bytes; a ring's messages."""
    plan = cd.plan(program, job.shape, dtype=getattr(torch, job.dtype)).to_json()
    row: Row = {
        "program": plan["program"],
        "lowering": plan["lowering"],
        "pairs": plan["useful_pairs"],
        "computed_pairs": plan["computed_pairs"],
        "tiles": plan["tiles"],
        "flops": 4 * job.head_dim * plan["useful_pairs"],
        "tensor_bytes": plan["tensor_bytes"],
        "planned_bytes": plan["peak_bytes"],
    }
    ranks = _ranks(job)
    if ranks > 1:
        ring = cd.plan(program, job.shape, dtype=getattr(torch, job.dtype), ranks=ranks)
        chosen = next(layout for layout in ring.to_json()["layouts"] if layout["chosen"])
        row["ring"] = {"ranks": ranks, **chosen}
    return row


def _ranks(job: Job) -> int:
    """The ring size of a job.

    A variant's is the number at the end of its name.
    """
    suffix = job.way.rpartition("_r")[2]
    return int(suffix) if job.kind == "variant" and suffix.isdigit() else job.ranks


# A limit of memory --------------------------------------------------------------------------


def _limit(job: Job) -> Row:
    """The sizes that a plan fits into a limit, and their peaks.

    They are computed here if the process may use as much memory.
    """
    limit = job.settings["gib"] * 2**30
    program = text.read_program(job.program)
    dtype = getattr(torch, job.dtype)
    plan = cd.plan(program, job.shape, dtype=dtype, training=job.backward, memory_limit=limit)
    assert plan.fit is not None
    assert plan.fit.tokens is not None
    sizes = {"tokens": (1, plan.fit.tokens), "batch": (plan.fit.batch, job.tokens)}
    row: Row = {"limit": plan.fit.to_json(), "error": None, "has_nan": False, "compared": "nothing"}
    allowed, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if allowed != resource.RLIM_INFINITY and limit > allowed - _BESIDE_TENSORS_BYTES:
        return row | {"seconds": [], "peaks": {}}
    row["peaks"], row["seconds"] = {}, []
    for name, (batch, tokens) in sizes.items():
        of_size = replace(job, kind="program", batch=batch, tokens=tokens)
        seconds, row["peaks"][name] = _time_and_peak(of_size)
        row["seconds"].append(seconds)
    return row


def _time_and_peak(job: Job) -> tuple[float, int]:
    """Seconds of a job's first call; peak of a later one, with inputs."""
    subject = _subject(job)
    call = _call(job, subject)
    seconds = measure.timed(call)
    return seconds, sum(x.nbytes for x in subject.inputs) + measure.peak_bytes(call)


# A sequence that is never in memory ---------------------------------------------------------


def _billion(job: Job) -> Row:
    """Run `compiled-dilated ring billion`, every step of every rank.

    The row has its counts.
    """
    from typer.testing import CliRunner

    from compiled_dilated.cli import app

    with tempfile.TemporaryDirectory() as directory:
        options = ["--tokens", job.tokens, "--heads", job.heads, "--dim", job.head_dim]
        options += ["--ranks", job.ranks, "--program", job.program, "--rows", 100]
        options += ["--directory", directory, "--threads", job.threads, "--json"]
        started = time.perf_counter()
        result = CliRunner().invoke(app, ["ring", "billion", *map(str, options)])
        seconds = time.perf_counter() - started
    if result.exit_code != 0:
        raise RuntimeError(result.output)
    counted = json.loads(result.stdout)
    return {
        "seconds": [seconds],
        "error": counted["most_error"],
        "has_nan": counted["most_error"] is None,
        "compared": f"{counted['rows_checked']} rows",
        "counted": counted,
    }
