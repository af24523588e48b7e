"""The planning room: what a memory budget is spent on, and what that leads to; pure, before a byte is read.

`account` says where every byte of a budget goes, `locks` which chunks stay in memory, `plan` puts both together;
`optimal` searches for the best plan with `simulate`, which runs a plan on a virtual clock with the seconds of `cost`;
`page_cache` is what mmap would do with the same memory, `report` shows plans as rows and pictures, `paper` repeats the
paper's experiment.
"""
