"""Pages of figures, written from the committed results: docs/measured.md and the table of patterns in README.md.

python benchmarks/measured.py [--check]

Each table states its command, the machine and the date of its file in benchmarks/results/. `--check` writes nothing and exits
with 1 if a page differs from the results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "measured.md"
README = ROOT / "README.md"
BEGIN = "<!-- figures: written by benchmarks/measured.py -->"
END = "<!-- end of figures -->"

Record = dict[str, Any]
Row = dict[str, Any]
ABSENT = "-"

# README's six patterns: what it is for, the call, its case in the results of attention.py or masks.py.
PATTERNS = (
    ("text, recent tokens", "`masks.window(256)`", "window-16k"),
    ("text, all distances", "`cd.longnet((2048, 4096, 8192), (1, 2, 4))`", "longnet-16k"),
    ("images", "`masks.neighborhood((64, 64), 12)`", "row-major-64x64"),
    ("packed documents", '`masks.documents(ids="doc")`', "documents-sorted-8k"),
    ("encoders of long text", "`cd.big_bird(...)`", "bigbird-4k"),
    ("everything before", "`masks.causal()`", "causal-16k"),
)


@dataclass(frozen=True)
class Section:
    """A table of the page.

    heading: its title.
    subject: the name of its results without `-cpu-<date>.json`; the newest file is read.
    command: what measures it anew.
    text: what the columns mean.
    rows: the table's rows from the file's content.
    """

    heading: str
    subject: str
    command: str
    text: str
    rows: Callable[[Record], Iterable[Row]]


def newest(subject: str) -> Path:
    """The newest results of a subject; raises FileNotFoundError where there are none."""
    files = sorted(RESULTS.glob(f"{subject}-cpu-[0-9]*.json"))
    if not files:
        raise FileNotFoundError(f"{RESULTS} has no results of {subject}")
    return files[-1]


def read(subject: str) -> Record:
    """The content of the newest results of a subject."""
    record: Record = json.loads(newest(subject).read_text())
    return record


def number(value: float | None, digits: int = 2) -> str:
    """A figure with fixed digits, or a dash."""
    return ABSENT if value is None else f"{value:,.{digits}f}"


# Cases of attention.py and masks.py -----------------------------------------------------------------------------------------


def rival(row: Row | None, name: str) -> str:
    """The share of a rival, and a dash where it was refused or not measured."""
    value = (row or {}).get("rivals", {}).get(name) or {}
    return number(value.get("share"))


def by_case(record: Record) -> list[Row]:
    """Both passes of a case in one row."""
    passes: dict[tuple[str, str], dict[str, Row]] = {}
    for row in record["rows"]:
        passes.setdefault((row["case"], row["dtype"]), {})[row["pass"]] = row
    table = []
    for (case, dtype), rows in passes.items():
        forward, both = rows.get("forward"), rows.get("forward + backward")
        first = forward or both or {}
        table.append(
            {
                "case": case,
                "dtype": dtype,
                "share of": first["of"],
                "forward": number(forward and forward["share"]),
                "forward + backward": number(both and both["share"]),
                "FlexAttention, forward": rival(forward, "flex"),
                "without a compiler, forward": rival(forward, "fallback"),
                "SDPA with a mask, forward": rival(forward, "SDPA"),
            }
        )
    return without_empty_columns(table)


def without_empty_columns(table: list[Row]) -> list[Row]:
    """The table without columns of dashes alone."""
    empty = [name for name in table[0] if all(row[name] == ABSENT for row in table)]
    return [{name: value for name, value in row.items() if name not in empty} for row in table]


def busy(record: Record) -> Iterable[Row]:
    """How much slower each case gets beside one busy process."""
    for row in record["rows"]:
        yield {
            "case": row["case"],
            "pass": row["pass"],
            "ours, times slower": number(row["slower"]["ours"]["median"]),
            "dense SDPA, times slower": number(row["slower"]["baseline"]["median"]),
        }


# Other benchmarks -----------------------------------------------------------------------------------------------------------


def first_call(record: Record) -> Iterable[Row]:
    """Seconds of import and of the first two calls."""
    for row in record["rows"]:
        seconds = {f"{name}, s": number(row[f"{name} s"], 3) for name in ("import", "first", "second")}
        yield {"cache": row["cache"], **seconds}


def decoding(record: Record) -> Iterable[Row]:
    """One query against a cache."""
    for row in record["rows"]:
        yield {
            "mask": f"`{row['mask']}`".replace("|", "\\|"),
            "keys seen": f"{row['keys seen']:,}",
            "ours, us": number(row["us"], 0),
            "SDPA over these keys, us": number(row["SDPA us"], 0),
            "ratio": number(row["ratio"]),
        }


def doors(record: Record) -> Iterable[Row]:
    """What the look for NaN costs."""
    for row in record["rows"]:
        yield {
            "program": row["program"],
            "pass": row["pass"],
            "ms": number(row["ms"], 0),
            "with the look / without": number(row["check"]),
            "a call that finds some / one that does not": number(row["with NaN"]),
        }


def headline(record: Record) -> Iterable[Row]:
    """Resident memory and time of a whole model."""
    for row in record["tables"]["headline"]:
        yield {
            "step": row["step"],
            "tokens": f"{row['tokens']:,}",
            "torch.compile, MiB": number(row["plain MiB"], 0),
            "passes, MiB": number(row["ours MiB"], 0),
            "memory, ratio": number(row["of plain"]),
            "time, ratio": number(row["time of plain"]),
        }


def ways(table: str) -> Callable[[Record], Iterable[Row]]:
    """Rows of a process per way of computing: tokens, memory, seconds."""

    def rows(record: Record) -> Iterable[Row]:
        for row in record["tables"][table]:
            seconds = row.get("compile and step s", row.get("seconds"))
            yield {
                "way": row["way"],
                "tokens": f"{row['tokens']:,}",
                "process, GiB": number(row["process GiB"], 1),
                "s": number(seconds, 0),
            }

    return rows


def single_passes(record: Record) -> Iterable[Row]:
    """Memory in activations of the residual stream."""
    for row in record["passes"]:
        yield {
            "step": row["step"],
            "passes": " ".join(name.split("(")[0] for name in row["passes"].split("), ")),
            "before": number(row["before U"], 1),
            "after": number(row["U"], 1),
            "time, ratio": number(row["time of before"]),
        }


def order(record: Record) -> Iterable[Row]:
    """Pairs of candidates that a budget puts in the right order of time."""
    for row in record["tables"]["order"]:
        yield {
            "step": row["step"],
            "width": row["width"],
            "tokens": f"{row['tokens']:,}",
            "pairs": row["pairs"],
            "in the right order": row["right"],
        }


def exchange(record: Record) -> Iterable[Row]:
    """What eight simulated ranks exchange."""
    for row in record["tables"]["exchange"]:
        yield {
            "program": row["program"].replace("|", "\\|"),
            "layout": row["layout"],
            "steps": row["steps"],
            "steps of a plain ring": row["of a plain ring"],
            "MiB moved": number(row["MiB moved"], 0),
            "of a plain ring's": number(row["of plain ring or all-gather"], 3),
            "time / one device": number(row["time / one device"]),
        }


def ranks(record: Record) -> Iterable[Row]:
    """What one rank keeps in rings of any size."""
    for row in record["tables"]["peak"]:
        yield {
            "ranks": f"{row['ranks']:,}",
            "tokens": f"{row['tokens']:,}",
            "a rank keeps, KiB": number(row["rank holds KiB"], 0),
            "process, MiB": number(row["process MiB"], 0),
        }


def billion(record: Record) -> Iterable[Row]:
    """The run of many ranks' schedules."""
    yield {
        "tokens": f"{record['tokens']:,}",
        "ranks": f"{record['ranks']:,}",
        "steps": f"{record['steps']:,}",
        "s": number(record["seconds"], 0),
        "tokens/s": number(record["tokens_per_second"], 0),
        "process, MiB": number(record["process_peak_bytes"] / 2**20, 0),
    }


ATTENTION_TEXT = (
    "Useful rates, allowed pairs over time, as shares of dense SDPA's at 4096 tokens in the same dtype and run, or of what "
    "`share of` names: `SDPA` is the same problem by one dense call, with inverse times. 8 heads of 64, medians. A dash is a "
    "case that was refused or not measured. `without a compiler` is the `tiled` lowering."
)
SECTIONS = (
    Section("Attention", "attention", "benchmarks/attention.py", ATTENTION_TEXT, by_case),
    Section("Attention: dtypes, layouts, short and long sequences", "attention-more", "benchmarks/attention.py", "", by_case),
    Section(
        "Documents, tiles, functions",
        "masks",
        "benchmarks/masks.py",
        "As above. `mod-` are mask_mods of FlexAttention, `alibi` and `soft-cap` score_mods over a causal mask.",
        by_case,
    ),
    Section("One thread of AVX2", "attention-avx2", "benchmarks/attention.py --avx2", "", by_case),
    Section("Beside a busy process", "attention-busy", "benchmarks/attention.py --busy", "", busy),
    Section("The first call", "first-call", "benchmarks/first_call.py", "`cold`: the kernel is compiled.", first_call),
    Section("Decoding", "decoding", "benchmarks/decoding.py", "One query against a cache of 65,536 keys.", decoding),
    Section("Hidden NaN", "doors", "benchmarks/doors.py", "", doors),
    Section(
        "Memory of a training step",
        "memory-training-64k",
        "benchmarks/memory.py --step training",
        "Four layers of width 512, SwiGLU, LongNet attention, a vocabulary of 32K with its loss.",
        headline,
    ),
    Section("Memory of inference", "memory-inference-64k", "benchmarks/memory.py --step inference", "", headline),
    Section("A million tokens", "memory-million", "benchmarks/memory.py --only million", "Width 256, bfloat16.", ways("million")),
    Section(
        "The longest training step in 8 GiB",
        "memory-longest",
        "benchmarks/memory.py --only longest",
        "Memory alone: other work ran beside it.",
        ways("longest"),
    ),
    Section(
        "Each pass alone",
        "single-passes",
        "benchmarks/single_passes.py",
        "Memory in activations of the residual stream, (tokens, width).",
        single_passes,
    ),
    Section("The order of candidates", "memory-order", "benchmarks/memory.py --only order", "", order),
    Section("Exchange in a ring of 8 ranks", "ring", "benchmarks/ring.py", "16,384 tokens, simulated.", exchange),
    Section("A rank of a ring", "ring", "benchmarks/ring.py", "4,096 tokens a rank.", ranks),
    Section(
        "The longest attention in 8 GiB",
        "ring-longest",
        "benchmarks/ring.py --only longest",
        "LongNet, float16.",
        ways("longest"),
    ),
    Section(
        "Many ranks",
        "billion-16m",
        "compiled-dilated ring billion --tokens 16777216",
        "Every step of every rank's schedule; random rows agree with float64.",
        billion,
    ),
)


def markdown(rows: Iterable[Row]) -> str:
    """A table of Markdown whose cells are text."""
    return tabulate(list(rows), headers="keys", tablefmt="github", disable_numparse=True)


def machine(record: Record) -> str:
    """What the figures were measured on."""
    hardware = record.get("hardware")
    if hardware is None:
        return "machine not recorded"
    isa = f", {hardware['isa']}" if "isa" in hardware else ""
    return f"{hardware['cpu']}{isa}, {hardware['threads']} threads, torch {hardware['torch']}, {hardware['date'][:10]}"


def page() -> str:
    """The text of docs/measured.md."""
    parts = ["# Measured\n\nWritten by `python benchmarks/measured.py` from the files in `benchmarks/results/`.\n"]
    for section in SECTIONS:
        record = read(section.subject)
        command = section.command if section.command.startswith("compiled") else f"python {section.command}"
        source = f"`{command}` · `{newest(section.subject).name}` · {machine(record)}"
        text = [f"## {section.heading}", section.text, markdown(section.rows(record)), source]
        parts.append("\n\n".join(block for block in text if block) + "\n")
    return "\n".join(parts)


def patterns() -> str:
    """The table of README.md."""
    shares: dict[str, dict[str, float]] = {}
    for subject in ("attention", "attention-more", "masks"):
        for row in read(subject)["rows"]:
            if row["dtype"] == "float32":
                shares.setdefault(row["case"], {})[row["pass"]] = row["share"]
    rows = []
    for use, call, case in PATTERNS:
        share = shares[case]
        rows.append({"for": use, "call": call, "forward": number(share["forward"]), "both": number(share["forward + backward"])})
    return markdown(rows)


def readme() -> str:
    """README.md with its table written anew."""
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{patterns()}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page differs")
    options = parser.parse_args()
    status = 0
    for path, text in ((PAGE, page()), (README, readme())):
        if path.exists() and path.read_text() == text:
            continue
        if options.check:
            print(f"{path.relative_to(ROOT)} differs from the results: run python benchmarks/measured.py")
            status = 1
        else:
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
