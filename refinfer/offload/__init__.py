"""The offload room: run a model in less memory than its weights take.

`budget` counts bytes, `store` reads them, `packed_file` checks them, `readers` and `prefetch` bring chunks in time, and
`streamed` gives the transformer its weights. `calibration` keeps what reading and multiplying cost here, `prediction`
says what a run should reach, `run` opens one. Which chunks stay in memory is decided before, in `planning`.
"""
