"""The bytes of one tile of 16 rows in the four formats, drawn to scale, with the scales where they lie."""

from __future__ import annotations

from refinfer.packing.formats import FORMATS, layout_of

_ROWS, _K = 16, 64
_LEFT, _TOP, _WIDTH, _STEP = 70, 74, 600, 62


def draw() -> str:
    """Draw a bar for each format: the bytes of the weights, and those of the scales behind them."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 320" width="700" height="320">',
        '<g font-family="sans-serif" font-size="16" fill="#333333">',
        '<rect width="700" height="320" fill="white"/>',
        f'<text x="20" y="26" font-weight="bold">one tile of {_ROWS} rows and {_K} columns, to scale</text>',
        '<rect x="20" y="40" width="14" height="14" fill="#4c78a8"/><text x="40" y="53">weights</text>',
        '<rect x="120" y="40" width="14" height="14" fill="#f28e2b"/><text x="140" y="53">scales</text>',
    ]
    largest = _tile_nbytes("f32")
    for i, name in enumerate(FORMATS):
        nbytes, y = _tile_nbytes(name), _TOP + _STEP * i
        weights = min(nbytes, {"int8": _ROWS * _K, "int4": _ROWS * _K // 2}.get(name, nbytes))
        end = _LEFT + _WIDTH * nbytes / largest
        split = _LEFT + _WIDTH * weights / largest
        parts.append(f'<text x="20" y="{y + 27}">{name}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{split - _LEFT:.1f}" height="40" fill="#4c78a8"/>')
        parts.append(f'<rect x="{split:.1f}" y="{y}" width="{end - split:.1f}" height="40" fill="#f28e2b"/>')
        inside = name == "f32"
        words = f"{nbytes:,} bytes, {8 * nbytes / (_ROWS * _K):g} bits a weight"
        parts.append(
            f'<text x="{end - 10 if inside else end + 10:.0f}" y="{y + 26}" '
            f'text-anchor="{"end" if inside else "start"}" fill="{"white" if inside else "#333333"}">{words}</text>'
        )
    return "\n".join([*parts, "</g>", "</svg>", ""])


def _tile_nbytes(name: str) -> int:
    layout = layout_of(name, _ROWS, _K)
    return layout.format.tile_nbytes(layout.tile.nr, _K)
