"""The room of weight sources whose weights are all in memory or mapped; `offload` has those within a budget.

`matrices` multiplies packed chunks wherever they are, `packed` gives a transformer the weights of a provider, `mapped`
checks the chunks of a mapped file before they are used.
"""
