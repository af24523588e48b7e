"""Draws a packed model and a budget of a quarter of it on one scale: what lies in memory, what streams through it."""

from __future__ import annotations

from dataclasses import replace

from refinfer.inventory import Inventory
from refinfer.model.config import SHAPES
from refinfer.planning.account import fixed_of
from refinfer.planning.cost import HERE, costs_of
from refinfer.planning.plan import make_plan
from refinfer.units import format_nbytes

_LEFT, _WIDTH, _BAR = 20, 680, 44
_LOCKED, _STREAMED, _OTHER, _ACCENT = "#59a14f", "#4c78a8", "#bab0ac", "#f28e2b"


def draw() -> str:
    """Plan the model of tutorial 12 within a quarter of its weights."""
    config = replace(
        SHAPES["llama2-7b"],
        num_hidden_layers=12,
        hidden_size=384,
        intermediate_size=1024,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=64,
        vocab_size=512,
    )
    inventory = Inventory(config, "bf16")
    total = inventory.streamable_nbytes
    fixed = fixed_of(inventory, 16)
    account = make_plan("balanced", inventory, fixed, total // 4, costs_of(inventory, HERE)).account
    scale = _WIDTH / total
    locked, ring, other = (nbytes * scale for nbytes in (account.locked, account.ring, fixed.total))
    top, below = 72, 196
    ring_x = _LEFT + locked + ring / 2
    parts = (
        (_LOCKED, "locked", account.locked),
        (_STREAMED, "ring", account.ring),
        (_OTHER, "norms, KV cache, scratch", fixed.total),
    )
    lines = [
        (
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 300" width="720" height="300" '
            'font-family="sans-serif" font-size="17">'
        ),
        '<rect width="720" height="300" fill="#ffffff"/>',
        (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{_ACCENT}"/></marker></defs>'
        ),
        '<text x="20" y="26" font-size="19" font-weight="bold">Four times the memory: both bars on one scale</text>',
        f'<text x="{_LEFT}" y="{top - 10}">the packed matrices, on disk: {format_nbytes(total)}</text>',
        _bar(_LEFT, top, locked, _LOCKED),
        _bar(_LEFT + locked, top, _WIDTH - locked, _STREAMED),
        (
            f'<text x="{_LEFT + locked + 12:.1f}" y="{top + 27}" fill="#ffffff">'
            f"read for every token: {format_nbytes(total - account.locked)}</text>"
        ),
        _arrow(_LEFT + locked / 2, top + _BAR, _LEFT + locked / 2, below - 3),
        (
            f'<path d="M{_LEFT + _WIDTH / 2:.1f} {top + _BAR} C {_LEFT + _WIDTH / 2:.1f} {below - 30}, {ring_x:.1f} '
            f'{below - 60}, {ring_x:.1f} {below - 3}" fill="none" stroke="{_ACCENT}" stroke-width="2" '
            'marker-end="url(#tip)"/>'
        ),
        f'<text x="{_LEFT + locked / 2 + 8:.1f}" y="{top + _BAR + 26}">once</text>',
        f'<text x="{_LEFT + _WIDTH / 2 + 10:.1f}" y="{top + _BAR + 26}">a chunk at a time, for every token</text>',
        _bar(_LEFT, below, locked, _LOCKED),
        _bar(_LEFT + locked, below, ring, _STREAMED),
        _bar(_LEFT + locked + ring, below, other, _OTHER),
        (
            f'<rect x="{_LEFT}" y="{below}" width="{account.budget * scale:.1f}" height="{_BAR}" fill="none" '
            'stroke="#333333" stroke-width="2"/>'
        ),
        f'<text x="{_LEFT}" y="{below + _BAR + 24}">the budget, in memory: {format_nbytes(account.budget)}</text>',
    ]
    for i, (colour, what, nbytes) in enumerate(parts):
        y = below - 4 + 28 * i
        lines.append(f'<rect x="346" y="{y}" width="14" height="14" fill="{colour}"/>')
        lines.append(f'<text x="368" y="{y + 12}">{what}: {format_nbytes(nbytes)}</text>')
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def _bar(x: float, y: float, width: float, colour: str) -> str:
    """Return a part of a bar."""
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}" stroke="#ffffff"/>'


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """Return an arrow."""
    return (
        f'<line x1="{x1:.1f}" y1="{y1}" x2="{x2:.1f}" y2="{y2}" stroke="{_ACCENT}" stroke-width="2" '
        'marker-end="url(#tip)"/>'
    )
