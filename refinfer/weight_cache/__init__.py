"""The weight cache room: packed buffers under their keys, in memory or in one mapped file that can be trusted.

`key` and `packers` say what a buffer is, `provider` which verbs a cache answers; `memory` and `file` answer them.
`format` is the file's bytes, `publish` brings a file into being all at once, `sources` tells whether a model is still
the same, `checksum` whether a chunk is, `directory` where files lie.
"""
