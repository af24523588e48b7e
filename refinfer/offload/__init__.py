"""The offload room: run a model in less memory than its weights take.

Before a byte is read: `inventory` says what a model's cache file holds, `cost` what reading and multiplying take,
`simulate` what that leads to, `locks`, `optimal` and `plan` which chunks stay in memory; `report` shows it, `paper`
repeats the paper's experiment. Then `budget` keeps count, `store` reads, `prefetch` and `readers` bring chunks in time,
`matrices` multiply them; `source`, `mapped` and `streamed` give the transformer its weights, wherever they are.
"""
