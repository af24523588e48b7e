"""Draws the storyteller on the virtual clock, with no, one and two prefetch threads, on one ruler."""

from __future__ import annotations

from refinfer.generate import STORYTELLER
from refinfer.inventory import Inventory
from refinfer.model.folder import open_folder
from refinfer.planning.account import fixed_of
from refinfer.planning.cost import HERE, costs_of
from refinfer.planning.plan import Prefetch, make_plan
from refinfer.planning.report import simulate_plan
from refinfer.trace import KINDS

_LEFT, _WIDTH, _LANE, _SHOWN_S = 92, 612, 34, 4.2e-3
_HEADS = ("no thread: read when it is needed", "one thread", "two threads")


def draw() -> str:
    """Plan 80 % of the weights as budget for each number of threads, simulate, draw from the start of a token."""
    inventory = Inventory(open_folder(STORYTELLER).config, "bf16")
    budget = inventory.streamable_nbytes * 8 // 10
    lines: list[str] = []
    y = 68
    for threads, head in enumerate(_HEADS):
        costs = costs_of(inventory, HERE, prefetch_threads=threads)
        plan = make_plan("balanced", inventory, fixed_of(inventory, 40), budget, costs, Prefetch(threads))
        run = simulate_plan(inventory, plan, costs, traced=True)
        lines.append(
            f'<text x="{_LEFT}" y="{y + 14}" font-weight="bold">{head}: {1e3 * run.token_s:.1f} ms a token</text>'
        )
        y += 24
        start = run.trace.start
        for lane in run.trace.lanes:
            lines.append(f'<text x="{_LEFT - 10}" y="{y + 20}" text-anchor="end">{lane}</text>')
            for span in run.trace.between(start, start + _SHOWN_S).spans:
                if span.lane == lane:
                    x = _LEFT + _WIDTH * (span.start - start) / _SHOWN_S
                    width = _WIDTH * (span.end - span.start) / _SHOWN_S
                    lines.append(
                        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="26" fill="{KINDS[span.kind]}" '
                        'stroke="#ffffff" stroke-width="0.5"/>'
                    )
            y += _LANE
        end = _LEFT + _WIDTH * run.token_s / _SHOWN_S
        lines.append(
            f'<line x1="{end:.1f}" y1="{y - _LANE * len(run.trace.lanes) - 5}" x2="{end:.1f}" y2="{y - 4}" '
            'stroke="#f28e2b" stroke-width="3"/>'
        )
        y += 14
    for tick in range(5):
        x = _LEFT + _WIDTH * tick * 1e-3 / _SHOWN_S
        lines.append(f'<text x="{x:.1f}" y="{y + 10}" text-anchor="middle">{tick} ms</text>')
    height, left = y + 24, _LEFT
    head_lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" width="720" height="{height}" '
            'font-family="sans-serif" font-size="17">'
        ),
        f'<rect width="720" height="{height}" fill="#ffffff"/>',
        '<text x="14" y="24" font-size="19" font-weight="bold">The storyteller with 40 % of its weights locked</text>',
    ]
    for kind, text in (("read", "read"), ("compute", "multiply"), ("wait", "wait")):
        head_lines.append(f'<rect x="{left}" y="38" width="14" height="14" fill="{KINDS[kind]}"/>')
        head_lines.append(f'<text x="{left + 20}" y="50">{text}</text>')
        left += 112
    head_lines.append(f'<rect x="{left}" y="38" width="3" height="14" fill="#f28e2b"/>')
    head_lines.append(f'<text x="{left + 9}" y="50">the next token begins</text>')
    return "\n".join([*head_lines, *lines, "</svg>"]) + "\n"
