"""One step of a micro-kernel: the weights it wants, in row-major memory and in a packed tile."""

from __future__ import annotations

from refinfer.packing.layout import TileShape
from refinfer.packing.xnnpack import GoiLayout

_GREY, _ORANGE, _DARK, _INK = "#bab0ac", "#f28e2b", "#a85400", "#333333"
_N, _K, _NR, _STEP = 8, 4, 4, 1


def draw() -> str:
    """Draw a matrix in two tiles, and where column 1 of the first tile lies in both orders."""
    wanted = {f"w{n}{_STEP}" for n in range(_NR)}
    first_tile = {f"w{n}{k}" for n in range(_NR) for k in range(_K)}
    row_major = [f"w{n}{k}" for n in range(_N) for k in range(_K)]
    packed = GoiLayout(_N, _K, TileShape(_NR)).labels()
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 480" width="700" height="480">',
        '<g font-family="sans-serif">',
        '<rect width="700" height="480" fill="white"/>',
    ]
    for i, label in enumerate(row_major):
        row, column = divmod(i, _K)
        parts.append(_cell(20 + 62 * column, 34 + 30 * row, 62, label, wanted, first_tile))
    for tile in range(_N // _NR):
        y = 34 + 30 * _NR * tile
        parts.append(
            f'<rect x="20" y="{y}" width="{62 * _K}" height="{30 * _NR}" fill="none" stroke="{_INK}" stroke-width="3"/>'
        )
    parts += [
        _text(20, 22, "the matrix: 8 rows, 4 columns"),
        _text(300, 70, "a tile: nr = 4 rows,"),
        _text(300, 92, "4 outputs computed side by side"),
        _text(300, 134, "orange: what the kernel multiplies", _DARK),
        _text(300, 156, "with x[1], in one instruction", _DARK),
        _text(300, 214, "the next tile"),
    ]
    for y, words, order in (
        (300, "in memory, row by row: four places", row_major),
        (405, "in memory, packed: one place; the next step begins where it ends", packed),
    ):
        parts.append(_text(20, y, words))
        parts += [
            _cell(20 + 41 * i, y + 12, 41, label, wanted, first_tile) for i, label in enumerate(order[: _NR * _K])
        ]
        parts.append(_text(20, y + 66, "0"))
        parts.append(_text(20 + 41 * _NR * _K, y + 66, str(_NR * _K), anchor="end"))
    return "\n".join([*parts, "</g>", "</svg>", ""])


def _cell(x: int, y: int, width: int, label: str, wanted: set[str], tile: set[str]) -> str:
    fill = _ORANGE if label in wanted else "#dbe5f0" if label in tile else "#efecea"
    weight = "bold" if label in wanted else "normal"
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="30" fill="{fill}" stroke="{_GREY}"/>'
        f'<text x="{x + width / 2:g}" y="{y + 20}" font-size="15" font-weight="{weight}" text-anchor="middle" '
        f'fill="{_INK}">{label}</text>'
    )


def _text(x: int, y: int, words: str, fill: str = _INK, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-size="17" text-anchor="{anchor}" fill="{fill}">{words}</text>'
