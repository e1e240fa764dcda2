"""How a report looks as terminal text, Markdown, HTML and LaTeX: each writer lays out the same `Contents`."""

from __future__ import annotations

import html as markup
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from workbench.labels import POINTS
from workbench.palette import VERDICT_COLOURS
from workbench.records import Verdict
from workbench.report_contents import Contents, Table
from workbench.terminal import visible

WIDTH = 100  # columns of the terminal report
_STRIP_WIDTH = 41
_LEGEND = "Under each claim, in points: ● a seed, ┊ the margin, ┼ no difference."
_PLAIN = str.maketrans({"●": "o", "─": "-", "┊": ":", "┼": "+", "·": "-", "±": "~", "…": "."})


def text(contents: Contents) -> str:
    """Lay out for a terminal of 100 columns; in ASCII where the terminal's encoding has no dots and lines."""
    table = contents.claims.without("Variant")
    parts = [contents.title, *_wrapped(contents.question), "", *_text_table(table), *_wrapped(table.caption)]
    parts += [_LEGEND] if any(item.verdict.differences for item in contents.lines) else []
    reach = _reach(contents.verdicts)
    for item in contents.lines:
        parts += ["", *_wrapped(f"{item.verdict.verdict.upper()}  {item.claim}: {item.text}")]
        if item.verdict.differences:
            parts.append("    " + strip(item.verdict, reach))
        parts += [line for detail in item.details for line in _detail_lines(detail)]
    for table in contents.scores:
        parts += ["", table.title, *_text_table(table)]
    parts += ["", *(line for fact in contents.facts for line in _detail_lines(fact, indent=""))]
    return printable("\n".join(parts) + "\n", sys.stdout.encoding or "ascii")


def printable(said: str, encoding: str) -> str:
    """Return text that a stream of this encoding can show, and that steers no terminal."""
    said = visible(said)
    try:
        said.encode(encoding)
    except UnicodeEncodeError:
        return said.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
    return said


def strip(verdict: Verdict, reach: float) -> str:
    """Draw the dot of every seed on a line from -reach to reach: `┊` marks the margins, `┼` is 0."""
    cells = ["─"] * _STRIP_WIDTH

    def place(value: float) -> int:
        return round((value / reach + 1) / 2 * (_STRIP_WIDTH - 1))

    cells[place(-verdict.margin)] = cells[place(verdict.margin)] = "┊"
    cells[place(0.0)] = "┼"
    for value in verdict.differences.values():
        cells[place(value)] = "●"
    return f"{-POINTS * reach:+.1f} {''.join(cells)} {POINTS * reach:+.1f}"


def markdown(contents: Contents, out: Path | None) -> str:
    """Lay out as GitHub Markdown; the figures are written as PNG files beside `out`, and left out without it."""
    parts = [f"# {_md(contents.title)}", _md(contents.question)]
    parts += [_md_table(contents.claims), _md(_caption(contents.claims))]
    if out is not None:
        from workbench import figures  # matplotlib takes a second to import, and only figures need it

        out.parent.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.of_report(contents.results).items():
            file = out.with_name(f"{out.stem}_{name}.png")
            figures.save(figure, file)
            parts.append(f"![{figures.ALT[name]}]({file.name})")
    for item in contents.lines:
        parts.append(f"### {_md(item.claim)}: {item.verdict.verdict}")
        parts.append(_md(item.text))
        parts.append("\n".join(f"- {_md(detail)}" for detail in item.details))
    for table in contents.scores:
        parts += [f"## {table.title}", _md_table(table), _md(table.caption)]
    parts += ["## Cost and provenance", "\n".join(f"- {_md(fact)}" for fact in contents.facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def html(contents: Contents) -> str:
    """Lay out as one self-contained page, figures inside, legible in light and in dark."""
    from workbench import figures

    drawn = [
        f'<figure role="img" aria-label="{markup.escape(figures.ALT[name])}">{figures.svg(figure)}</figure>'
        for name, figure in figures.of_report(contents.results).items()
    ]
    cards = [
        f'<section class="card" style="--verdict:{VERDICT_COLOURS[item.verdict.verdict]}">'
        f'<h3><span class="badge">{item.verdict.verdict}</span> {_esc(item.text)}</h3>'
        f'<p class="id">{_esc(item.claim)}</p>'
        f"<ul>{''.join(f'<li>{_esc(detail)}</li>' for detail in item.details)}</ul></section>"
        for item in contents.lines
    ]
    body = [
        f"<h1>{_esc(contents.title)}</h1><p class=question>{_esc(contents.question)}</p>",
        _html_table(contents.claims),
        *drawn,
        "<h2>Claim by claim</h2>",
        *cards,
        *(f"<h2>{_esc(table.title)}</h2>{_html_table(table)}" for table in contents.scores),
        f"<h2>Cost and provenance</h2><ul>{''.join(f'<li>{_esc(fact)}</li>' for fact in contents.facts)}</ul>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_esc(contents.title)}</title>\n<style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def latex(contents: Contents) -> str:
    r"""Return the table of claims for a paper; it needs \usepackage{booktabs}."""
    table = contents.claims
    rows = [
        " & ".join(rf"\textbf{{{_tex(cell)}}}" if index in table.bold else _tex(cell) for cell in row) + r" \\"
        for index, row in enumerate(table.rows)
    ]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(contents.question)} {_tex(_caption(table))}}}",
        rf"\begin{{tabular}}{{{'l' * table.left}{'r' * (len(table.header) - table.left)}}}",
        r"\toprule",
        " & ".join(_tex(name) for name in table.header) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------- text


def _wrapped(said: str, indent: str = "") -> list[str]:
    return textwrap.wrap(said, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def _detail_lines(said: str, indent: str = "    ") -> list[str]:
    """Wrap a sentence; a command stays on one line, to be copied."""
    before, word, command = said.partition("python -m workbench ")
    if not word:
        return _wrapped(said, indent)
    return [*_wrapped(before.rstrip(), indent), f"{indent}  {word}{command}"]


def _text_table(table: Table) -> list[str]:
    """Return aligned rows; the widest word columns are cut where the table would not fit."""
    widths = [max(len(row[i]) for row in (table.header, *table.rows)) for i in range(len(table.header))]
    excess = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    while excess > 0 and max(widths[: table.left]) > 8:
        widest = max(range(table.left), key=lambda i: widths[i])
        widths[widest] -= 1
        excess -= 1
    header = _text_row(table.header, widths, table.left)
    return [header, "─" * len(header), *(_text_row(row, widths, table.left) for row in table.rows)]


def _text_row(row: Sequence[str], widths: Sequence[int], left: int) -> str:
    cells = [cell if len(cell) <= width else cell[: width - 1] + "…" for cell, width in zip(row, widths, strict=True)]
    return "  ".join(
        cell.ljust(width) if index < left else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )


def _reach(verdicts: Sequence[Verdict]) -> float:
    """Return how far the dot strips reach on either side of 0, the same for all claims."""
    return max([1e-3, *(1.5 * v.margin for v in verdicts), *(abs(d) for v in verdicts for d in v.differences.values())])


# ------------------------------------------------------------------------------------- captions, tables, escapes


def _caption(table: Table) -> str:
    return table.caption + (" Bold: supported claims." if table.bold else "")


def _md(said: str) -> str:
    said = " ".join(visible(said).split())  # on one line, where nothing begins a block of its own
    for character in "\\|_*`~":
        said = said.replace(character, f"\\{character}")
    for character, instead in (("<", "&lt;"), ("](", "]\\("), ("]:", "]\\:")):  # the last two make links and pictures
        said = said.replace(character, instead)
    return said


def _md_table(table: Table) -> str:
    def row(cells: Sequence[str], *, bold: bool = False) -> str:
        return "| " + " | ".join(f"**{_md(cell)}**" if bold else _md(cell) for cell in cells) + " |"

    rule = ["---" if index < table.left else "---:" for index in range(len(table.header))]
    rows = [row(cells, bold=index in table.bold) for index, cells in enumerate(table.rows)]
    return "\n".join([row(table.header), "| " + " | ".join(rule) + " |", *rows])


def _esc(said: str) -> str:
    return markup.escape(visible(said))


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str, *, bold: bool = False) -> str:
        kind = ["" if index < table.left else " class=n" for index in range(len(cells))]
        inside = "".join(f"<{tag}{k}>{_esc(cell)}</{tag}>" for k, cell in zip(kind, cells, strict=True))
        return f"<tr{' class=bold' if bold else ''}>{inside}</tr>"

    body = "".join(row(cells, "td", bold=index in table.bold) for index, cells in enumerate(table.rows))
    caption = f"<p class=caption>{_esc(_caption(table))}</p>" if table.caption else ""
    return (
        f"<div class=wide><table><thead>{row(table.header, 'th')}</thead><tbody>{body}</tbody></table></div>{caption}"
    )


_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "·": r"$\cdot$",
    }
)  # fmt: skip


def _tex(said: str) -> str:
    return visible(said).translate(_TEX)


_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #5b6570; --line: #d8dee4; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0f1419; --soft: #9aa7b3; --line: #30363d; --card: #171d24; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 64rem;
  margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0; }
.question { font-size: 1.1rem; color: var(--soft); margin-top: .3rem; }
.caption, .id { font-size: .85rem; color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--line); }
.n { text-align: right; white-space: nowrap; }
thead th { font-size: .85rem; color: var(--soft); } .bold td { font-weight: 650; }
figure { margin: 1.8rem 0; } figure svg { width: 100%; height: auto; }
.card { background: var(--card); border-left: 4px solid var(--verdict); border-radius: 6px; padding: .8rem 1.1rem;
  margin: .9rem 0; }
.card .id { margin: .1rem 0 .4rem; font-family: ui-monospace, monospace; } ul { margin: 0; padding-left: 1.2rem; }
.badge { background: var(--verdict); color: #fff; border-radius: 99px; padding: .1rem .65rem; font-size: .8rem;
  margin-right: .4rem; }
"""
