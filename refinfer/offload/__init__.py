"""The offload room: run a model in less memory than its weights take.

`inventory` says what a model's cache file holds, `plan` which chunks stay in memory, `budget` keeps count, `store`
reads chunks from disk, `source` gives the transformer its weights, wherever they are.
"""
