"""The packing room: how weights are laid out for a matmul, and the matmul that reads them.

Leaves to others: models, files, memory budgets.

Read in this order: `product` (one numpy call), `layout` (tiles, chunks, what a format is), a page for each format
(`f32`, `bf16`, `int8`, `int4`), `formats` (their table), `matmul` (the product over chunks). `xnnpack` stands by
itself: the layouts that the article packs.
"""
