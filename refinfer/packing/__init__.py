"""The packing room: how weights are laid out for a matmul, and the matmul that reads them.

Knows: arrays and bytes. Does not know: models, files, memory budgets.

Read in this order: `layout` (where everything goes, no data), `gemm` (float packers), `quantized` (int8 and int4),
`formats` (the four formats of the engine, and a packed matrix), `product` and `kernels` (which numpy calls, and what
they do to a chunk), `matmul` (the numpy core).
"""
