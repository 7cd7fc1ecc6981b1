"""What a report is made of, whatever it is written as: headings, paragraphs, tables and pictures."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

__all__ = ["Block", "Details", "Heading", "Picture", "Table", "Text", "csv_text", "html", "latex", "markdown", "png"]

DPI = 150
LONG = 40  #: letters of a cell that LaTeX breaks into lines
TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class Heading:
    """Level 2 for a section, 3 and 4 below."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; of several lines, a list."""

    lines: tuple[str, ...]
    strong: bool = False

    @classmethod
    def of(cls, *lines: str, strong: bool = False) -> Text:
        return cls(lines, strong)


@dataclass(frozen=True)
class Table:
    """Rows of words; the first column names a row.

    Attributes:
        name: of its file.
        caption: what it shows, in a sentence.
        header: of the columns.
        rows: as long as the header.
    """

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: of its file.
        figure: of matplotlib.
        caption: below it.
        alt: what it shows, for those who do not see it.
    """

    name: str
    figure: Figure
    caption: str
    alt: str


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away."""

    summary: str
    blocks: list[Block] = field(default_factory=list)


Block = Heading | Text | Table | Picture | Details


# ---- writing ---------------------------------------------------------------------------------------------------------


def html(title: str, blocks: Sequence[Block]) -> str:
    """One page that needs nothing else."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text())
    sections = [(slug(b.text), b.text) for b in blocks if isinstance(b, Heading) and b.level == 2]
    return template.render(
        title=title, blocks=blocks, sections=sections, kind=lambda b: type(b).__name__, slug=slug, data_uri=data_uri
    )


def slug(text: str) -> str:
    """Part of a link or a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def png(figure: Figure) -> bytes:
    """The picture as a file, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def data_uri(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(png(figure)).decode()


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """With links to ``figures/NAME.png``."""
    return "\n\n".join([f"# {title}", *(_markdown(block) for block in blocks)]) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Text):
        if len(block.lines) > 1:
            return "\n".join(f"- {line}" for line in block.lines)
        return f"**{block.lines[0]}**" if block.strong else block.lines[0]
    if isinstance(block, Table):
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (block.header, *block.rows)]
        marks = ["---", *["---:"] * (len(block.header) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (cells[0], marks, *cells[1:])]
        return f"{block.caption}\n\n" + "\n".join(lines)
    if isinstance(block, Picture):
        return f"![{block.alt}](figures/{block.name}.png)\n\n{block.caption}"
    inner = "\n\n".join(map(_markdown, block.blocks))
    return f"<details><summary>{block.summary}</summary>\n\n{inner}\n\n</details>"


ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "∞": r"$\infty$",
    "‖": r"$\|$",
    "λ": r"$\lambda$",
    "ε": r"$\varepsilon$",
    "×": r"$\times$",
}


def tex(text: str) -> str:
    """Words as LaTeX shows them."""
    return "".join(ESCAPES.get(letter, letter) for letter in text)


def latex(table: Table) -> str:
    """For a document that uses booktabs and graphicx: as wide as the page, long words in lines."""
    lines = [" & ".join(map(tex, row)) + r" \\" for row in (table.header, *table.rows)]
    lengths = [max(len(row[i]) for row in (table.header, *table.rows)) for i in range(len(table.header))]
    columns = "l" + "".join(r"p{0.35\linewidth}" if length > LONG else "r" for length in lengths[1:])
    return "\n".join(
        (
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{tex(table.caption)}}}",
            rf"\label{{tab:{table.name}}}",
            rf"\resizebox{{\linewidth}}{{!}}{{\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        )
    )


def csv_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()
