"""The weight cache room: packed buffers under their keys, in memory or in one mapped file that can be trusted.

`key` and `packers` say what a buffer is, `provider` which verbs a cache answers; `memory` and `file` answer them.
`format` is the file's bytes, `mapped_file` the file as a process sees it, `publish` brings a file into being at once,
`identity` finds whether a model is still the same, `load_or_build` decides what a start does, `directory` knows where
files lie.
"""
