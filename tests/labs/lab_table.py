"""The table of labs on the page for teachers: `python tests/labs/lab_table.py` writes it."""

from __future__ import annotations

from pathlib import Path

from refinfer.labs.catalogue import Lab, labs

PAGE = Path(__file__).parents[2] / "docs" / "teaching.md"
BEGIN, END = "<!-- labs -->\n\n", "\n\n<!-- end of labs -->"


def _row(lab: Lab) -> str:
    tutorial = next((PAGE.parents[1] / "tutorials").glob(f"{lab.page}-*.md")).name
    where = ", ".join(f"`{path}`" for path in dict.fromkeys(place.module for place in lab.places))
    optional = ", optional" if lab.is_optional else ""
    return f"| {lab.number}{optional} | {lab.title} | {lab.minutes} | [{lab.page}](tutorials/{tutorial}) | {where} |"


def table() -> str:
    """Return the table."""
    head = "| lab | title | minutes | tutorial | in |\n|---|---|---|---|---|"
    return "\n".join([head, *map(_row, labs())])


if __name__ == "__main__":
    text = PAGE.read_text()
    begin = text.index(BEGIN) + len(BEGIN)
    PAGE.write_text(text[:begin] + table() + text[text.index(END) :])
