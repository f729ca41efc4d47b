"""The report as Markdown, and as one self-contained HTML file."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from tabulate import tabulate

from .cells import Records
from .section import Section

TITLE = "Attention by compiled_dilated: measurements"

# How a reader measures the same.
_COMMANDS = """
    pip install -e ".[peers]"
    pip install --no-deps --no-build-isolation natten==0.21.7 dilated-attention-pytorch==0.2.0
    compiled-dilated report run
    compiled-dilated report render
"""

# Colours by scheme; lines differ by dash and mark as well.
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #57606a; --rule: #d0d7de;
  --band: #f6f8fa; --s0: #0b5cad; --s1: #b3410e; --s2: #1a7f37; --s3: #8250df; --s4: #9a6700;
  --s5: #bf3989; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --soft: #9198a1;
  --rule: #3d444d; --band: #151b23; --s0: #6cb6ff; --s1: #ff9f6b; --s2: #57c76f; --s3: #c297ff;
  --s4: #e0b341; --s5: #ff85c0; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  margin: 0 auto; max-width: 70rem; padding: 1.5rem; }
a { color: var(--s0); }
nav ol { columns: 2 24rem; font-size: .9rem; }
h2 { border-top: 1px solid var(--rule); margin-top: 2.5rem; padding-top: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--rule); padding: .3rem .7rem; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; }
thead th { background: var(--band); }
figure { margin: 1.5rem 0; }
figcaption { font-weight: 600; }
figure > svg { height: auto; max-width: 45rem; width: 100%; }
.axis { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 2; }
.mark { fill: var(--paper); stroke-width: 2; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); }
.s3 { stroke: var(--s3); } .s4 { stroke: var(--s4); } .s5 { stroke: var(--s5); }
.legend { display: flex; flex-wrap: wrap; font-size: .85rem; gap: .3rem 1.2rem; list-style: none;
  padding: 0; }
.key { height: 12px; width: 36px; }
"""


def markdown(records: Records, sections: Sequence[Section]) -> str:
    """All sections as Markdown; charts are in the HTML alone."""
    parts = [f"# {TITLE}", _sources(records), _COMMANDS.strip("\n")]
    for section in sections:
        table = tabulate(section.rows, section.headers, tablefmt="pipe", disable_numparse=True)
        parts.append(f"## {section.heading}\n\n{section.text}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def html_page(records: Records, sections: Sequence[Section]) -> str:
    """All sections with their charts as one page.

    It is light or dark as the reader's system is.
    """
    contents, body = [], []
    for section in sections:
        anchor = _anchor(section.heading)
        heading = html.escape(section.heading)
        contents.append(f'<li><a href="#{anchor}">{heading}</a></li>')
        chart = section.chart.svg() if section.chart else ""
        body.append(
            f'<section id="{anchor}"><h2>{heading}</h2><p>{_paragraph(section.text)}</p>'
            f"{chart}{_table(section)}</section>"
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{_STYLE}</style></head><body><h1>{TITLE}</h1>"
        f"<p>{_paragraph(_sources(records))}</p>"
        f"<nav><ol>{''.join(contents)}</ol></nav><main>{''.join(body)}</main></body></html>\n"
    )


def _paragraph(text: str) -> str:
    """Markdown's text as HTML: `code` is code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _table(section: Section) -> str:
    # A measurement that failed has no figures behind its reason.
    width = len(section.headers)
    rows = [[*row, *[""] * (width - len(row))] for row in section.rows]
    classes = []
    for column in range(width):
        is_text = _is_text([row[column] for row in rows])
        classes.append(' class="text"' if is_text else "")
    head = ""
    for style, cell in zip(classes, section.headers, strict=True):
        head += f'<th scope="col"{style}>{html.escape(cell)}</th>'
    body = ""
    for row in rows:
        cells = ""
        for style, cell in zip(classes, row, strict=True):
            cells += f"<td{style}>{html.escape(cell)}</td>"
        body += f"<tr>{cells}</tr>"
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _is_text(column: Sequence[str]) -> bool:
    """Whether most cells of a column are no figures."""
    texts = [cell for cell in column if cell and not cell[0].isdigit()]
    return 2 * len(texts) > len(column)


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def _sources(records: Records) -> str:
    """The origin of the figures: machines, versions, commits and dates."""
    machines, commits, dates = set(), set(), set()
    for record in records.values():
        hardware = record["hardware"]
        machines.add(f"{hardware['cpu']} ({hardware['isa']}), torch {hardware['torch']}")
        commits |= {(row["commit"] or "unknown")[:10] for row in record["rows"]}
        dates |= {row["date"] for row in record["rows"]}
    suites = ", ".join(records)
    return (
        f"Suites: {suites}. Machine: {'; '.join(sorted(machines))}. "
        f"Commits: {', '.join(sorted(commits))}. Measured: {min(dates)} to {max(dates)}. "
        "A row of another package is `not installed` where that package is absent."
    )
