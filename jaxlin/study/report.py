"""The report of a study, from its folders' JSON files alone: `python -m jaxlin.study.report --out DIR`.

report.md and report.html, a single file that needs nothing else. Every number names its files: in HTML as the attribute
data-source of its cell or mark, in Markdown in a list under each table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from jaxlin.command_line import parse, run_main
from jaxlin.runs import write_text
from jaxlin.study.estimates import Estimates
from jaxlin.study.figures import Figure, figures
from jaxlin.study.limits import limits
from jaxlin.study.results import read_study
from jaxlin.study.tables import Table, tables

LIMITS = "What was not run, and what may not be concluded"
STYLE = (
    "body{font:15px/1.5 sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto;font-variant-numeric:tabular-nums}"
    "th,td{border-bottom:1px solid #ddd;padding:3px 9px;text-align:left;white-space:nowrap}"
    "svg{max-width:100%;height:auto}p.note{color:#555;font-size:13px}"
)


def write_report(out: Path, speed: Path | None = None) -> list[Path]:
    """Write report.md and report.html into the study's folder; their paths. Raises UserError without a study."""
    found = read_study(out)
    estimates = Estimates(found)
    parts = (found.study.name, tables(estimates), figures(estimates, speed), limits(estimates))
    paths = [out / "report.md", out / "report.html"]
    for path, text in zip(paths, (markdown(*parts), html(*parts)), strict=True):
        write_text(path, text)
    return paths


def markdown(name: str, found: Sequence[Table], drawn: Sequence[Figure], remarks: Sequence[str]) -> str:
    """The tables, with their files; the figures are in the HTML page."""
    parts = [f"# {name}", *map(_markdown_table, found)]
    if drawn:
        parts.append("Figures, in report.html: " + "; ".join(figure.title for figure in drawn) + ".")
    parts += [f"## {LIMITS}", "\n".join(f"- {remark}" for remark in remarks)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    rows = [line(table.headings), line(["---"] * len(table.headings))]
    rows += [line([entry.text for entry in row]) for row in table.rows]
    files = dict.fromkeys(file for row in table.rows for entry in row for file in entry.sources)
    under = [table.note] * bool(table.note) + ["Files: " + ", ".join(f"`{file}`" for file in files) + "."] * bool(files)
    return "\n\n".join([f"## {table.title}", "\n".join(rows), *under])


def html(name: str, found: Sequence[Table], drawn: Sequence[Figure], remarks: Sequence[str]) -> str:
    """One page without scripts or references."""
    title = escape(name)
    parts = [f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>']
    parts += [f"<style>{STYLE}</style></head><body><h1>{title}</h1>", *map(_html_table, found)]
    parts += [f"<h2>{escape(figure.title)}</h2>\n<p>{figure.svg}</p>" for figure in drawn]
    items = "".join(f"<li>{escape(remark)}</li>" for remark in remarks)
    return "\n".join([*parts, f"<h2>{LIMITS}</h2><ul>{items}</ul></body></html>\n"])


def _html_table(table: Table) -> str:
    def cell(text: str, sources: Sequence[str]) -> str:
        files = escape(" ".join(sources))
        return f'<td data-source="{files}" title="{files}">{escape(text)}</td>' if files else f"<td>{escape(text)}</td>"

    head = "".join(f"<th>{escape(heading)}</th>" for heading in table.headings)
    rows = ["<tr>" + "".join(cell(entry.text, entry.sources) for entry in row) + "</tr>" for row in table.rows]
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f"<h2>{escape(table.title)}</h2>\n<table><tr>{head}</tr>\n" + "\n".join(rows) + f"</table>{note}"


@dataclass(frozen=True)
class Settings:
    """Write the report of a study."""

    out: Path
    """Folder of the study."""
    speed: Path | None = None
    """The JSON file of `python -m benchmarks.generation_speed`, for figure 3."""


def main() -> None:
    """Entry point of `python -m jaxlin.study.report`."""
    settings = parse(Settings)
    for path in write_report(settings.out, settings.speed):
        print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
