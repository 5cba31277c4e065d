"""The report of a study, from its folders' JSON files alone: `python -m jaxlin.study.report --out DIR`.

report.md and report.html, a single file that needs nothing else. Every number names its files: in HTML as the attribute
data-source of its cell or mark, in Markdown in a list under each table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from jaxlin.command_line import parse, run_main
from jaxlin.runs import write_text
from jaxlin.study.design import short
from jaxlin.study.estimates import Estimates
from jaxlin.study.figures import Figure, figures
from jaxlin.study.limits import limits
from jaxlin.study.results import StudyResults, read_study
from jaxlin.study.tables import Table, tables

HINT = "The files that a number comes from are shown where the pointer rests on it."
NUMBER = re.compile(r"[+-]?\d")
LIMITS = "What was not run, and what may not be concluded"
STYLE = (
    ":root{color-scheme:light}body{font:16px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1120px;padding:0 1.5em;"
    "color:#1a1a1a;background:#fff}h1{font-size:1.7em;margin-bottom:.2em}h2{font-size:1.2em;margin:2em 0 .5em}"
    ".scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}"
    "th,td{border-bottom:1px solid #ddd;padding:4px 14px 4px 0;text-align:left;vertical-align:top}"
    "th{border-bottom:2px solid #555;vertical-align:bottom}.whole{white-space:nowrap}"
    "td:first-child,th:first-child{position:sticky;left:0;background:#fff}"
    "figure{margin:0}svg{max-width:100%;height:auto}p.note,figcaption{color:#444;font-size:13px;max-width:75em}"
)


def write_report(out: Path, speed: Path | None = None) -> list[Path]:
    """Write report.md and report.html into the study's folder; their paths. Raises UserError without a study."""
    found = read_study(out)
    estimates = Estimates(found)
    parts = (found, tables(estimates), figures(estimates, speed), limits(estimates))
    paths = [out / "report.md", out / "report.html"]
    for path, text in zip(paths, (markdown(*parts), html(*parts)), strict=True):
        write_text(path, text)
    return paths


def lead(found: StudyResults) -> str:
    """What the report is about."""
    done = sum(bool(run.held_out) for run in found.trials)
    teachers = dict.fromkeys(Path(name).name for run in found.trials if (name := run.config.get("teacher")))
    devices = dict.fromkeys(run.card["devices"] for run in found.trials if run.card.get("devices"))
    budgets = dict.fromkeys(f"{short(trial.cell.tokens)} tokens" for trial in found.study.trials())
    facts = [f"{done} of {len(found.study.trials())} runs finished", f"budget: {', '.join(budgets)}"]
    facts += [f"teacher: {', '.join(teachers)}"] * bool(teachers) + [f"devices: {', '.join(devices)}"] * bool(devices)
    return "; ".join(facts) + "."


def markdown(study: StudyResults, found: Sequence[Table], drawn: Sequence[Figure], remarks: Sequence[str]) -> str:
    """The tables, with their files; the figures are in the HTML page."""
    parts = [f"# {study.study.name}", lead(study), *map(_markdown_table, found)]
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


def html(study: StudyResults, found: Sequence[Table], drawn: Sequence[Figure], remarks: Sequence[str]) -> str:
    """One page without scripts or references."""
    title = escape(study.study.name)
    parts = [f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>']
    parts += [f"<style>{STYLE}</style></head><body><h1>{title}</h1><p>{escape(lead(study))} {HINT}</p>"]
    parts += [*map(_html_table, found), *map(_html_figure, drawn)]
    items = "".join(f"<li>{escape(remark)}</li>" for remark in remarks)
    return "\n".join([*parts, f"<h2>{LIMITS}</h2><ul>{items}</ul></body></html>\n"])


def _html_figure(figure: Figure) -> str:
    caption = f"<figcaption>{escape(figure.note)}</figcaption>" if figure.note else ""
    return f"<h2>{escape(figure.title)}</h2>\n<figure>{figure.svg}{caption}</figure>"


def _html_table(table: Table) -> str:
    def cell(text: str, sources: Sequence[str], first: bool) -> str:
        files = escape(" ".join(sources))
        whole = ' class="whole"' if NUMBER.match(text) or (first and " " not in text) else ""
        where = f' data-source="{files}" title="{files}"' if files else ""
        return f"<td{whole}{where}>{escape(text) if whole else escape(text).replace('/', '/<wbr>')}</td>"

    head = "".join(f"<th>{escape(heading)}</th>" for heading in table.headings)
    rows = []
    for before, row in zip([None, *table.rows], table.rows, strict=False):
        same = before is not None and before[0].text == row[0].text  # whose name stands above
        cells = [cell("" if same and not at else e.text, e.sources, not at) for at, e in enumerate(row)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    top = f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table><tr>{head}</tr>\n'
    return top + "\n".join(rows) + f"</table></div>{note}"


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
