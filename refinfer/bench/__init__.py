"""Measurements: what this machine can do, and what refinfer reaches on it.

Uses every other room, and reports figures without judging them. Leaves to others: what a good figure would be.

Every bench runs its candidates interleaved, round by round, and reports medians of per-round ratios, because the speed
of a shared machine changes during a measurement.
"""
