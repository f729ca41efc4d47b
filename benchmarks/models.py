"""Measure prefill, decoding and training of a small Llama of transformers.

Its rivals are transformers' attentions sdpa, eager and flex.

python benchmarks/models.py [--json FILE] [--quick] [--only TEXT] [--limit 8]

prefill    one forward over all tokens, no cache
decode     greedy generate() behind a prompt of these tokens, with a dynamic and a static cache
train      forward with labels and backward
compiled   prefill under torch.compile(model, fullgraph=True); graphs of three lengths are counted

The rivals compute plain causal attention, and so does `ours` without a program: the same work. A
window and LongNet are programs of ours for the same model; their ratios are against plain sdpa.
Each case is a process of its own with limits of memory and time. Results of plain ways are compared
with those of sdpa. Needs a quiet machine for an hour or two.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness.apart import row_of
from harness.runs import Progress, is_chosen, origin, print_names
from tabulate import tabulate

import compiled_dilated as cd
from compiled_dilated import masks, measure

Row = dict[str, Any]

PROGRAMS = {
    "window 1024": masks.causal() & masks.window(1024),
    "LongNet": cd.longnet((2048, 8192, 32768), (1, 4, 16), causal=True),
}
RIVALS = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention"}
WORKS = ("prefill", "decode dynamic", "decode static", "train", "compiled")
LENGTHS, QUICK_LENGTHS = (4096, 16384, 65536), (2048,)
# No further call is timed after so many seconds of timed calls.
ENOUGH_SECONDS = 30
# The largest difference of two ways' results, as a share of the largest number.
MOST_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Job:
    """One case.

    program: a name of PROGRAMS, or "plain".
    way: "ours", or a name of RIVALS.
    new: tokens that decode generates.
    repeats: timed calls after the first, fewer where they take long.
    """

    work: str
    tokens: int
    program: str
    way: str
    width: int = 512
    layers: int = 4
    new: int = 257
    repeats: int = 3
    threads: int = 2

    @property
    def name(self) -> str:
        return f"{self.work}, {self.tokens:,} tokens, {self.program}, {self.way}"

    def here(self) -> Row:
        """Measure the case in this process."""
        torch.set_num_threads(self.threads)
        model, ids = self._model(), self._ids(self.tokens)
        torch._dynamo.utils.counters.clear()
        if self.work.startswith("decode"):
            return self._decode(model, ids)
        call = self._call(model, ids)
        start = time.perf_counter()
        row: Row = {"result": call()}
        row["first_seconds"] = time.perf_counter() - start
        seconds, row["peak_bytes"] = measure.seconds_and_peak_bytes(call)
        # A call of a minute is measured once: its spread is small beside its length.
        row["seconds"] = [seconds] if seconds > ENOUGH_SECONDS else []
        while len(row["seconds"]) < self.repeats and sum(row["seconds"]) < ENOUGH_SECONDS:
            row["seconds"].append(measure.timed(call))
        if self.work == "compiled":
            for tokens in (self.tokens - 3, self.tokens // 2 + 1):
                self._call(model, self._ids(tokens))()
        row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return row

    def _model(self) -> Any:
        import transformers

        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=4096,
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            num_key_value_heads=max(1, self.width // 128),
            max_position_embeddings=self.tokens + self.new,
            eos_token_id=None,
            pad_token_id=0,
            attn_implementation=RIVALS.get(self.way, "eager"),
        )
        model = transformers.LlamaForCausalLM(config).eval()
        if self.way == "ours":
            model = cd.compile(model, attention=PROGRAMS.get(self.program))
        if self.work == "compiled":
            model.compile(fullgraph=True)
        return model

    def _ids(self, tokens: int) -> torch.Tensor:
        return torch.randint(1, 4096, (1, tokens), generator=torch.Generator().manual_seed(tokens))

    def _call(self, model: Any, ids: torch.Tensor) -> Callable[[], list[float]]:
        """A call of the model that returns some numbers of its result."""

        def forward() -> list[float]:
            with torch.no_grad():
                logits = model(ids, use_cache=False, logits_to_keep=1).logits
            numbers: list[float] = logits[0, -1, :8].tolist()
            return numbers

        def train() -> list[float]:
            model.zero_grad()
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            return [float(loss.detach())]

        return train if self.work == "train" else forward

    def _decode(self, model: Any, ids: torch.Tensor) -> Row:
        """Measure the seconds between tokens behind the prompt, as generate() streams them."""
        cache = "static" if self.work.endswith("static") else None
        options = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": False,
            "cache_implementation": cache,
            "disable_compile": True,
        }

        def generate(new: int, clock: Clock | None = None) -> list[int]:
            text = model.generate(ids, max_new_tokens=new, streamer=clock, **options)
            tokens: list[int] = text[0, ids.shape[1] :].tolist()
            return tokens

        row: Row = {"first_seconds": measure.timed(lambda: generate(2))}
        # The clock is of the tokens after the prompt, for which memory is there already.
        clock, texts = Clock(), []
        row["peak_bytes"] = measure.peak_bytes(lambda: texts.append(generate(self.new, clock)))
        row["result"] = texts[0]
        row["seconds"] = clock.between
        row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return row


class Clock:
    """A streamer of generate() that records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        """Record the time: of the prompt first, then of each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Required of a streamer; there is nothing to flush."""

    @property
    def between(self) -> list[float]:
        """Seconds between tokens; the prompt's own computation ends with the first."""
        return [after - before for before, after in itertools.pairwise(self.times[1:])]


def jobs_of(lengths: Sequence[int], **settings: int) -> list[Job]:
    """All cases; sdpa first, with which the other ways are compared."""
    ways = [("plain", "sdpa"), ("plain", "ours")]
    ways += [(program, "ours") for program in PROGRAMS]
    ways += [("plain", "eager"), ("plain", "flex")]
    out = []
    for work, tokens in itertools.product(WORKS, lengths):
        out += [Job(work, tokens, program, way, **settings) for program, way in ways]
    return out


def judged(row: Row, base: Row | None) -> Row:
    """Add the ratios to sdpa's, and whether the result was compared with it.

    "failed" where a plain way's results differ.
    """
    if "failed" in row:
        return row
    row["is_compared"] = row["program"] == "plain" and base is not None and "failed" not in base
    if base is None or "failed" in base:
        return row
    difference = _difference(row, base)
    if row["is_compared"] and difference:
        return row | {"failed": f"another result than sdpa's: {difference}"}
    row["time_of_sdpa"] = measure.median(row["seconds"]) / measure.median(base["seconds"])
    row["peak_of_sdpa"] = row["peak_bytes"] / max(1, base["peak_bytes"])
    return row


def _difference(row: Row, base: Row) -> str:
    """The first number that differs from sdpa's, as text; empty if none does.

    Tokens must be equal, other numbers up to rounding.
    """
    bound = 0.0
    if not row["work"].startswith("decode"):
        bound = MOST_DIFFERENCE * max(abs(number) for number in base["result"])
    pairs = zip(row["result"], base["result"], strict=True)
    for number, (ours, expected) in enumerate(pairs):
        # Not `>`: NaN is a difference.
        if not abs(ours - expected) <= bound:
            return f"{ours} for {expected}, number {number}"
    return ""


def _ratio(row: Row, name: str) -> str:
    """A ratio of a row; nothing where it was not computed."""
    return f"{row[name]:.2f}" if name in row else ""


def table(rows: Sequence[Row]) -> str:
    """The figures as a table, and below it why cases failed."""
    figures = ["s", "tokens/s", "of sdpa", "peak MiB", "of sdpa", "first s", "graphs"]
    headers = ["work", "tokens", "program", "way", *figures]
    body, notes = [], []
    for row in rows:
        start = [row["work"], f"{row['tokens']:,}", row["program"], row["way"]]
        if "failed" in row:
            body.append([*start, "failed"])
            notes.append(f"{', '.join(start)}: {row['failed']}")
            continue
        seconds = measure.median(row["seconds"])
        tokens = 1 if row["work"].startswith("decode") else row["tokens"]
        times = [f"{seconds:.4g}", f"{tokens / seconds:.4g}", _ratio(row, "time_of_sdpa")]
        peaks = [f"{row['peak_bytes'] / 2**20:.0f}", _ratio(row, "peak_of_sdpa")]
        body.append([*start, *times, *peaks, f"{row['first_seconds']:.1f}", row["graphs"]])
    text: str = tabulate(body, headers=headers, disable_numparse=True)
    if notes:
        text += "\n\n" + "\n".join(notes)
    return text


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = out.add_argument
    option("--json", type=Path, metavar="FILE", help="where to write the figures")
    option("--quick", action="store_true", help="a smaller model, 2,048 tokens, some minutes")
    text = "cases whose name contains the text; may be repeated"
    option("--only", action="append", metavar="TEXT", help=text)
    option("--lengths", type=int, nargs="+", help=f"tokens {LENGTHS}")
    option("--layers", type=int, default=Job.layers, help="layers of the model (%(default)s)")
    text = "memory of a case's process (%(default)s)"
    option("--limit", type=float, default=8.0, metavar="GIB", help=text)
    text = "time of a case's process (%(default)s)"
    option("--seconds", type=float, default=900.0, help=text)
    option("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    option("--list", action="store_true", help="print the names of the cases and stop")
    option("--job", help=argparse.SUPPRESS)
    return out


def run(options: argparse.Namespace) -> int:
    """Measure cases, print the table, write the file; the exit code."""
    lengths, sizes = LENGTHS, {"layers": options.layers}
    if options.quick:
        lengths, sizes = QUICK_LENGTHS, {"width": 128, "layers": 2, "new": 9, "repeats": 2}
    jobs = jobs_of(options.lengths or lengths, threads=options.threads, **sizes)
    jobs = [job for job in jobs if is_chosen(job.name, options.only)]
    if options.list or not jobs:
        return print_names([job.name for job in jobs], options.only)
    record = _origin() | {"complete": False, "rows": []}
    limit_bytes = int(options.limit * 2**30)
    bases: dict[tuple[str, int], Row] = {}
    progress = Progress(len(jobs))
    for number, job in enumerate(jobs, 1):
        progress.start(job.name)
        row = asdict(job) | row_of(__file__, asdict(job), limit_bytes, options.seconds)
        # The first case of each work and length is sdpa's.
        if job.way == "sdpa":
            bases[job.work, job.tokens] = row
        row = judged(row, bases.get((job.work, job.tokens)))
        record["rows"].append(row)
        record["complete"] = number == len(jobs)
        if options.json:
            measure.write_json(options.json, record)
        progress.end(_summary(row))
    print("\n" + table(record["rows"]))
    return int(any(_is_fault(row) for row in record["rows"]))


def _is_fault(row: Row) -> bool:
    """Whether a result is wrong, or this library failed within the limits of its process."""
    reason = row.get("failed", "")
    is_limit = reason.startswith(("out of ", "took longer"))
    return "another result" in reason or (row["way"] == "ours" and bool(reason) and not is_limit)


def _origin() -> Row:
    """The run's origin with the version of transformers."""
    import transformers

    out = origin()
    out["hardware"]["transformers"] = transformers.__version__
    return out


def _summary(row: Row) -> str:
    if "failed" in row:
        return str(row["failed"])
    return f"{measure.median(row['seconds']):.4g} s"


def main() -> int:
    options = parser().parse_args()
    if options.job:
        print(json.dumps(Job(**json.loads(options.job)).here()))
        return 0
    return run(options)


if __name__ == "__main__":
    raise SystemExit(main())
