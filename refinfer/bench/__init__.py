"""The bench room: what this machine can show, and what refinfer reaches on it.

Knows: clocks, threads, every other room. Does not know: what a good figure would be; it reports and never judges.

Every bench runs its candidates interleaved, round by round, and reports medians of per-round ratios, because a shared
machine changes its speed while one looks.
"""
