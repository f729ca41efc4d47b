"""The report: rows, resumed runs, tables, charts and the page.

Rows come from work that was done.
"""

from __future__ import annotations

import dataclasses
import html.parser
import importlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from compiled_dilated import cli
from compiled_dilated.commands import report as command

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def reporting(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`reporting("jobs")` imports a module of benchmarks/reporting."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: importlib.import_module(f"reporting.{name}")


@pytest.fixture(autouse=True)
def same_threads() -> Any:
    """As many threads after a job as before it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Of a result in float32, as a share of its largest number.
TOLERANCE = 2e-5
SETTINGS = {"suite": "test", "tokens": 100, "heads": 2, "head_dim": 16, "turns": 2}
WAYS = [
    ("variant", "DilatedAttention", {}),
    ("variant", "RingDilatedAttentionV2_r4", {}),
    ("variant", "BlockSparse_LocalWindow_0.9", {}),
    ("variant", "MultiheadDilatedAttention", {}),
    ("program", "window", {"program": "causal() & window(9)"}),
    ("program", "ring", {"program": "causal() & window(9)", "ranks": 3}),
    ("peer", "SDPA", {"settings": {"program": "causal()"}}),
]


# Each way with a backward or without, in turn: four variants, two programs, a peer.
BACKWARD = itertools.cycle([False, True])


@pytest.mark.parametrize(
    ("kind", "way", "settings", "backward"),
    [(*way, backward) for way, backward in zip(WAYS, BACKWARD, strict=False)],
    ids=[way[1] for way in WAYS],
)
def test_rows_are_right(
    reporting: Any, kind: str, way: str, settings: dict[str, Any], backward: bool
) -> None:
    jobs = reporting("jobs")
    job = jobs.Job(kind=kind, way=way, backward=backward, **SETTINGS, **settings)
    row = jobs.row_of(job)
    assert row["compared"] == "all rows"
    assert row["error"] < TOLERANCE
    assert ("gradient_error" in row) == backward
    assert row.get("gradient_error", 0.0) < TOLERANCE
    assert len(row["seconds"]) == 2
    assert row["pairs"] > 0
    assert ("ring" in row) == (way in ("RingDilatedAttentionV2_r4", "ring"))
    json.dumps(row, allow_nan=False)


def test_sampled_rows_find_a_wrong_result(reporting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = reporting("jobs")
    monkeypatch.setattr(jobs, "_WHOLE_REFERENCE_TOKENS", 10)
    job = jobs.Job(kind="program", way="window", program="window(9)", **SETTINGS)
    assert jobs.row_of(job)["error"] < TOLERANCE
    subject = jobs._subject(job)
    out = subject.call(*subject.inputs)
    assert jobs._error(job, subject, out * 1.01)["error"] > 1e-3
    assert jobs._error(job, subject, out * math.nan)["has_nan"]


def test_a_wrong_gradient_is_found(reporting: Any) -> None:
    jobs = reporting("jobs")
    job = jobs.Job(kind="program", way="window", program="window(9)", backward=True, **SETTINGS)
    subject = jobs._subject(job)
    for x in subject.inputs:
        x.requires_grad_()
    assert jobs._gradient_error(subject)["gradient_error"] < TOLERANCE

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # The gradients of k and v are lost.
        out: torch.Tensor = subject.call(q, k.detach() + 0 * k, v.detach() + 0 * v)
        return out

    wrong = dataclasses.replace(subject, call=call)
    assert jobs._gradient_error(wrong)["gradient_error"] > 0.1


def test_a_billion_is_executed(reporting: Any) -> None:
    jobs = reporting("jobs")
    settings = SETTINGS | {"tokens": 5000, "heads": 1}
    job = jobs.Job(kind="billion", way="ring of 3", ranks=3, program="window(64)", **settings)
    row = jobs.row_of(job)
    assert row["counted"]["tokens_computed_now"] == 5000
    assert row["error"] < 1e-6


def test_every_suite_has_jobs_of_other_names(reporting: Any) -> None:
    for suite in reporting("suites").SUITES.values():
        for quick in (True, False):
            jobs = suite.jobs(quick)
            assert len({job.key for job in jobs}) == len(jobs) > 0
            assert {job.suite for job in jobs} == {suite.name}
        assert len(suite.jobs(True)) <= len(suite.jobs(False))


# Each takes from half an hour to an hour.
UNMEASURED = {
    "billion: ring of 262,144, 1,073,741,824 tokens, float32, forward",
    "limits: LongNet, 16 GiB, float32, forward",
    "limits: LongNet, 16 GiB, float32, forward + backward",
}


def test_the_committed_rows_are_those_of_the_suites(reporting: Any) -> None:
    jobs = reporting("jobs")
    for name, suite in reporting("suites").SUITES.items():
        record = json.loads((BENCHMARKS / "results" / "report" / f"{name}.json").read_text())
        measured = [jobs.Job(**row["job"]).key for row in record["rows"]]
        stated = {job.key for job in suite.jobs(False) if f"{name}: {job.name}" not in UNMEASURED}
        assert len(set(measured)) == len(measured)
        assert set(measured) - stated == set()
        assert stated - set(measured) == set()


def rows_of(reporting: Any, run: Any, directory: Path, **options: Any) -> list[dict[str, Any]]:
    """Run the short suite `single` without processes.

    A function takes their place.
    """
    running, suites = reporting("running"), reporting("suites")
    settings = {"quick": True, "only": (), "limit_bytes": 2**30, "seconds": 1.0, "anew": False}
    running.row_of = run
    chosen = [suites.SUITES["single"]]
    rows: list[dict[str, Any]] = running.run(chosen, directory, "script", **(settings | options))
    return rows


def test_a_run_goes_on_where_it_stopped(
    reporting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting("running"), "row_of", None)  # restored at the end
    calls: list[str] = []

    def measured(script: str, job: dict[str, Any], limit: int, seconds: float) -> dict[str, Any]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(job["way"])
        figures = {"seconds": [1.0], "error": 0.0, "has_nan": False, "compared": "all rows"}
        return figures | {"peak_bytes": 1}

    with pytest.raises(KeyboardInterrupt):
        rows_of(reporting, measured, tmp_path)
    record = json.loads((tmp_path / "single.json").read_text())
    assert [row["job"]["way"] for row in record["rows"]] == calls
    first = list(calls)
    calls.append("so that nothing stops it again")
    rows = rows_of(reporting, measured, tmp_path)
    assert len(rows) == 4
    assert not set(first) & set(calls[3:])
    assert len(calls) == 5
    # A choice of cases leaves the rows of others in the file.
    rows_of(reporting, measured, tmp_path, only=("Hilbert",), anew=True)
    record = json.loads((tmp_path / "single.json").read_text())
    assert len(record["rows"]) == 4
    assert len(calls) == 6


def test_a_peer_that_is_absent_is_a_row(reporting: Any) -> None:
    running, jobs = reporting("running"), reporting("jobs")
    job = jobs.Job(kind="peer", way="torchscale", **SETTINGS)
    assert running._row(job, "script", 2**30, 1.0)["failed"] == "not installed"


# Rendering ----------------------------------------------------------------------------------


def record(suite: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    hardware = {"cpu": "a CPU", "isa": "AVX2", "torch": "2"}
    return {"suite": suite, "question": "A question", "hardware": hardware, "rows": rows}


def row(way: str, tokens: int, seconds: float, **figures: Any) -> dict[str, Any]:
    job = {"suite": "long", "kind": "variant", "way": way, "tokens": tokens, "batch": 1}
    job |= {"dtype": "float32", "backward": False, "ranks": 1, "program": "", "head_dim": 64}
    job["suite"] = figures.pop("suite", "long")
    done = {"seconds": [seconds], "peak_bytes": 1000 * tokens, "flops": 10**9, "error": 1e-7}
    done |= {"is_right": True, "has_nan": False, "compared": "all rows"}
    return {"job": job, "commit": "0123456789abc", "date": "2026-01-02"} | done | figures


def test_tables(reporting: Any) -> None:
    tables = reporting("tables")
    rows = [
        row("SDPA", 1024, 2.0),
        row("SDPA", 4096, 32.0),
        row("DilatedAttention", 1024, 1.0),
        row("DilatedAttention", 4096, 0.25, is_right=False),
        {**row("slow", 1024, 0), "failed": "out of 8 GiB of memory"},
    ]
    by_heading = {
        section.heading: section for section in tables.sections({"long": record("long", rows)})
    }
    times = by_heading["Execution time: long, forward, float32"]
    assert list(times.headers) == ["way", "1K", "4K"]
    assert times.rows == [
        ["SDPA", "2 s", "32 s"],
        ["DilatedAttention", "1 s", "250 ms (WRONG)"],
        ["slow", "out of 8 GiB of memory", "-"],
    ]
    # A wrong result is recommended nowhere, however fast it is.
    best = by_heading["Which to use when"]
    fastest, leanest = "DilatedAttention (1 s)", "SDPA (0.977 MiB)"
    assert best.rows == [["long, forward, float32", "1K", fastest, leanest]]


def sections_of(reporting: Any, suite: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of each table of a record, by heading."""
    for one in rows:
        one["job"]["suite"] = suite
    sections = reporting("tables").sections({suite: record(suite, rows)})
    return {section.heading: section.rows for section in sections}


def failed(way: str, tokens: int, **figures: Any) -> dict[str, Any]:
    """A row of a case that ended out of memory."""
    return row(way, tokens, 1.0, **figures) | {"failed": "out of 8 GiB of memory. 3 GiB were used"}


def test_figures_by_length(reporting: Any) -> None:
    rows = [row("a way", 1024, 0.5), failed("a way", 2048)]
    tables = sections_of(reporting, "long", rows)
    group = "long, forward, float32"
    assert tables[f"Throughput: {group}"] == [["a way", "2,048", "out of 8 GiB of memory"]]
    assert tables[f"Memory for each token: {group}"] == [
        ["a way", "0.977 KiB", "out of 8 GiB of memory"]
    ]
    end = "2K: out of 8 GiB of memory. 3 GiB were used"
    peak = "0.000954 GiB"
    assert tables["Longest sequence computed"] == [[group, "a way", "1,024", "500 ms", peak, end]]


def test_figures_of_limits(reporting: Any) -> None:
    limit = {"limit": 1000, "tokens": 20000, "batch": 3}
    rows = [
        row("LongNet", 16384, 1.0, limit=limit, peaks={"tokens": 999, "batch": 500}),
        row("window", 16384, 1.0, limit=limit, peaks={}),
    ]
    for one in rows:
        one["job"]["settings"] = {"gib": 2}
    assert sections_of(reporting, "limits", rows)["What fits into a memory"] == [
        ["LongNet, forward", "2 GiB", "20,000", "99.9%", "3", "50.0%"],
        ["window, forward", "2 GiB", "20,000", "not run", "3", "not run"],
    ]


def test_figures_of_rings(reporting: Any) -> None:
    ring = {"layout": "zigzag", "steps_max": 4, "received_mib_max": 8.0}
    rows = [row("ring_r4", 4096, 0.25, ring=ring), row("one machine", 4096, 0.25)]
    assert sections_of(reporting, "ring", rows)["Rings"] == [
        ["ring_r4", "4,096", "zigzag", "4", "8 MiB", "250 ms"]
    ]


def test_figures_of_a_billion_and_a_trillion(reporting: Any) -> None:
    counted = {"steps": 20, "process_peak_bytes": 3 * 2**20}
    rows = [
        row("ring of 10", 10_000, 2.0, counted=counted, compared="100 rows"),
        row("ring of 20", 20_000, 1.0, counted=counted, compared="100 rows", is_right=False),
    ]
    for one, ranks in zip(rows, (10, 20), strict=True):
        one["job"]["ranks"] = ranks
    tables = sections_of(reporting, "billion", rows)
    assert tables["Sequences that are in no memory"] == [
        ["10,000", "10", "20", "5,000", "2 s", "3 MiB", "1.0e-07 of 100 rows"],
        ["20,000", "20", "20", "20,000", "1 s", "3 MiB", "1.0e-07 (WRONG) of 100 rows"],
    ]
    # From the longest right run: 1000 tokens a rank, 5000 tokens a second.
    figures = [figure for _, figure, _ in tables["A trillion tokens"]]
    assert figures == ["1,000,000,000", "2,315 days", "200 ms", "256 TB"]


WRONG = {"is_right": False, "error": None, "has_nan": True}


def test_figures_of_precisions(reporting: Any) -> None:
    rows = [row("window", 1024, 0.5), row("LongNet", 1024, 0.5, **WRONG)]
    figures = ["1,024", "float32", "forward", "500 ms", "2", "0.977 MiB"]
    assert sections_of(reporting, "dtypes", rows)["A question"] == [
        ["window", *figures, "1.0e-07"],
        ["LongNet", *figures, "NaN (WRONG)"],
    ]


def test_figures_of_peers(reporting: Any) -> None:
    rows = [
        row("ours", 1024, 0.5),
        row("fast", 1024, 0.25, is_right=False, error=0.5),
        row("of another dtype", 1024, 0.25),
        failed("large", 1024),
    ]
    rows[2]["job"]["dtype"] = "float16"
    size = "0.977 MiB"
    assert sections_of(reporting, "peers", rows)["What people use today"] == [
        ["", "1,024", "float32", "forward", "ours", "500 ms", "1.00", size, "1.0e-07"],
        ["", "1,024", "float32", "forward", "fast", "250 ms", "0.50", size, "5.0e-01 (WRONG)"],
        ["", "1,024", "float16", "forward", "of another dtype", "250 ms", "-", size, "1.0e-07"],
        ["", "1,024", "float32", "forward", "large", "out of 8 GiB of memory"],
    ]


def test_growth_is_fitted(reporting: Any) -> None:
    rows = [
        row("quadratic", tokens, 1.0, suite="memory", peak_bytes=3 * tokens**2)
        for tokens in (1024, 2048, 4096)
    ]
    sections = reporting("tables").sections({"memory": record("memory", rows)})
    growth = next(section for section in sections if section.heading == "How memory grows")
    assert growth.rows[0][:3] == ["memory, forward, float32", "quadratic", "2.00"]


class Page(html.parser.HTMLParser):
    """The ids and links of a page, and its tags' balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.ids |= {values["id"] or ""} if "id" in values else set()
        self.links += [values["href"] or ""] if "href" in values else []
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_alone(reporting: Any) -> None:
    tables, page = reporting("tables"), reporting("page")
    rows = [row("a <b> way", 1024, 1.0), row("a <b> way", 8192, 2.0), row("SDPA", 1024, 1.0)]
    records = {"long": record("long", rows)}
    text = page.html_page(records, tables.sections(records))
    parsed = Page(text)
    assert not parsed.open
    assert parsed.links
    assert all(link[1:] in parsed.ids for link in parsed.links)
    assert "a &lt;b&gt; way" in text
    assert "<b>" not in text
    assert not re.search(r"https?://|<script|<img|@import", text)
    assert text.count("<svg viewBox") > 0
    assert "prefers-color-scheme: dark" in text
    assert "NaN" not in text
    markdown = page.markdown(records, tables.sections(records))
    assert "| a <b> way |" in markdown.replace("  ", "")
    assert markdown.count("\n## ") == text.count("<h2>")


def test_the_committed_page_is_that_of_the_committed_records(reporting: Any) -> None:
    tables, page = reporting("tables"), reporting("page")
    records = tables.read(BENCHMARKS / "results" / "report")
    sections = tables.sections(records)
    docs = BENCHMARKS.parent / "docs"
    remedy = (
        "render anew: compiled-dilated report render --directory benchmarks/results/report "
        "--html docs/report.html --markdown docs/report.md"
    )
    assert (docs / "report.md").read_text() == page.markdown(records, sections), remedy
    assert (docs / "report.html").read_text() == page.html_page(records, sections), remedy


# The command --------------------------------------------------------------------------------


def test_the_command_runs_and_renders(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> int:
        return CliRunner().invoke(cli.app, ["report", *arguments]).exit_code

    directory = str(tmp_path / "records")
    only = ["--only", "StandardRingAttention"]
    assert call("run", "single", "--quick", *only, "--directory", directory) == 0
    printed = capfd.readouterr().out
    assert "[1/1] single: StandardRingAttention, 1,024 tokens" in printed
    assert "right" in printed
    files = ["--html", str(tmp_path / "a.html"), "--markdown", str(tmp_path / "a.md")]
    assert call("render", "--directory", directory, *files) == 0
    assert "StandardRingAttention" in (tmp_path / "a.md").read_text()
    assert call("run", "unknown", "--directory", directory) == 2
    assert "no suite is named 'unknown'; there are all, single" in capfd.readouterr().err
    assert call("render", "--directory", str(tmp_path / "none")) == 2
    assert "make some with `compiled-dilated report run`" in capfd.readouterr().err


def test_an_installed_package_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_SCRIPT", Path("nowhere/report.py"))
    result = CliRunner().invoke(cli.app, ["report", "run"])
    assert result.exit_code == 2
    assert "Get the source" in " ".join(result.stderr.split())
