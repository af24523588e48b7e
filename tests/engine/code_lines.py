"""How long a module is: what the architecture and the two evenings count."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path


def lines_of_code(path: Path) -> int:
    """Count the lines with code on them: neither blank, nor only a comment, nor part of a docstring."""
    tree = ast.parse(path.read_text())
    docstring_lines: set[int] = set()
    for node in ast.walk(tree):
        for child in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                docstring_lines |= set(range(child.lineno, (child.end_lineno or child.lineno) + 1))
    skipped = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    source = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines)
