"""One layer of the storyteller beside the residual stream, its matrices in true shapes, and a whole token below."""

from __future__ import annotations

from typing import Final

from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES

_MODEL: Final = SHAPES["storyteller"]
_SCALE: Final = 0.3  # pixels for each row and column of a matrix
_STREAM: Final = 74
_BLUE, _GREEN, _ORANGE, _GREY, _DARK = "#4c78a8", "#59a14f", "#f28e2b", "#bab0ac", "#333333"


def draw() -> str:
    """Draw the stream from top to bottom, the two halves of a layer beside it, the matrices of one token in a row."""
    lines = [
        (
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 770" width="700" height="770" '
            'font-family="sans-serif" font-size="16" text-anchor="middle">'
        ),
        (
            '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{_DARK}"/></marker></defs>'
        ),
        '<rect width="700" height="770" fill="#ffffff"/>',
        f'<line x1="{_STREAM}" y1="48" x2="{_STREAM}" y2="608" stroke="{_GREY}" stroke-width="10"/>',
        _text(20, 26, "a token: its row of embed_tokens", anchor="start"),
        _text(20, 640, "the last norm, and lm_head: logits", anchor="start"),
        f'<text x="{_STREAM - 22}" y="330" transform="rotate(-90 {_STREAM - 22} 330)">residual stream</text>',
        *_attention(60),
        *_feed_forward(330),
        *_token(680),
    ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _attention(y: int) -> list[str]:
    return [
        _text(690, y + 6, "attention: looks at the other tokens", anchor="end", bold=True),
        *_branch(y + 112),
        _arrow(178, y + 112, 206, y + 62),
        _arrow(178, y + 112, 206, y + 128),
        _arrow(178, y + 112, 206, y + 182),
        *_matrix("q_proj", 212, y + 34, _BLUE),
        *_matrix("k_proj", 212, y + 118, _BLUE),
        *_matrix("v_proj", 212, y + 172, _BLUE),
        _arrow(272, y + 62, 290, y + 62),
        _arrow(272, y + 128, 290, y + 128),
        *_box("RoPE", 294, y + 46, 56, 98),
        _arrow(352, y + 128, 386, y + 128),
        _arrow(272, y + 182, 386, y + 182),
        f'<rect x="390" y="{y + 112}" width="106" height="88" rx="4" fill="{_GREEN}"/>',
        _text(443, y + 150, "KV cache", "#ffffff"),
        _text(443, y + 172, "all tokens", "#ffffff"),
        _arrow(352, y + 62, 386, y + 62),
        *_box("attention", 390, y + 36, 106, 46),
        _arrow(443, y + 112, 443, y + 86),
        _arrow(498, y + 59, 536, y + 59),
        *_matrix("o_proj", 542, y + 30, _BLUE),
        *_back(571, y + 90, y + 226),
    ]


def _feed_forward(y: int) -> list[str]:
    return [
        _text(690, y + 6, "feed-forward: looks at each token by itself", anchor="end", bold=True),
        *_branch(y + 114),
        _arrow(178, y + 114, 206, y + 114),
        *_matrix("gate_proj", 212, y + 36, _ORANGE),
        *_matrix("up_proj", 300, y + 36, _ORANGE),
        _turning((190, y + 114), (190, y + 22), (329, y + 22), (329, y + 34)),
        _arrow(360, y + 114, 386, y + 114),
        _turning((241, y + 190), (241, y + 206), (453, y + 206), (453, y + 142)),
        *_box("silu(gate)\n× up", 390, y + 84, 126, 56),
        _arrow(518, y + 114, 532, y + 114),
        *_matrix("down_proj", 538, y + 84, _ORANGE),
        *_back(615, y + 144, y + 244),
    ]


def _token(y: int) -> list[str]:
    matrices = Inventory(_MODEL, "f32").matrices
    total = sum(matrix.layout.padded_nbytes for matrix in matrices)
    x = 20.0
    lines = [
        _text(20, y, "All matrices of one token in their order, as wide as they have bytes", anchor="start", bold=True)
    ]
    for matrix in matrices:
        width = 660 * matrix.layout.padded_nbytes / total
        colour = _GREY if matrix.kind == "lm_head" else _ORANGE if matrix.name.count("mlp") else _BLUE
        lines.append(
            f'<rect x="{x:.2f}" y="{y + 14}" width="{width:.2f}" height="30" fill="{colour}" '
            f'stroke="#ffffff" stroke-width="0.7"><title>{matrix.name}</title></rect>'
        )
        if matrix.kind == "gate_proj":
            lines.append(_text(round(x), y + 64, f"{matrix.layer}" if matrix.layer else "layer 0"))
        x += width
    return [*lines, _text(690, y + 64, "lm_head", anchor="end")]


def _matrix(kind: str, x: int, y: int, colour: str) -> list[str]:
    part = "mlp" if kind in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    rows, columns = _MODEL.layer_shapes()[f"{part}.{kind}.weight"]
    width, height = _SCALE * columns, _SCALE * rows
    name = kind.removesuffix("_proj")
    text = _text(round(x + width / 2), round(y + height / 2 + 5), name, _DARK if colour == _ORANGE else "#ffffff")
    return [f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>', text]


def _branch(y: int) -> list[str]:
    return [_arrow(_STREAM + 5, y, 110, y), *_box("norm", 114, y - 18, 62, 36)]


def _back(x: int, top: int, bottom: int) -> list[str]:
    return [
        _turning((x, top), (x, bottom), (_STREAM + 20, bottom)),
        f'<circle cx="{_STREAM}" cy="{bottom}" r="15" fill="#ffffff" stroke="{_DARK}" stroke-width="1.5"/>',
        _text(_STREAM, bottom + 6, "+"),
        _text(330, bottom - 8, "is added"),
    ]


def _box(text: str, x: int, y: int, width: int, height: int) -> list[str]:
    lines = text.split("\n")
    first = y + height // 2 + 15 - 10 * len(lines)
    return [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="#f2f0ef" stroke="{_GREY}"/>',
        *(_text(x + width // 2, first + 20 * i, line) for i, line in enumerate(lines)),
    ]


def _text(x: int, y: int, text: str, colour: str = _DARK, *, anchor: str = "", bold: bool = False) -> str:
    more = f' text-anchor="{anchor}"' if anchor else ""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="{colour}"{more}{weight}>{text}</text>'


def _arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    ends = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
    return f'<line {ends} stroke="{_DARK}" stroke-width="1.5" marker-end="url(#head)"/>'


def _turning(*corners: tuple[int, int]) -> str:
    points = " ".join(f"{x},{y}" for x, y in corners)
    return f'<polyline points="{points}" fill="none" stroke="{_DARK}" stroke-width="1.5" marker-end="url(#head)"/>'
