"""The model room: a Llama-shaped transformer in numpy, from the bytes of a checkpoint to the next token.

Configs, safetensors files, tokenizers, the arithmetic of the layers. Leaves to others: packing, weight caches,
offloading; wherever weights come from, they come through the two Protocols of `weights`.

Read in this order: `config`, `weights`, `layers`, `kv_cache`, `transformer`, `sampler`; then `safetensors`,
`tokenizer`, `checkpoint` and `synth`, which meet the outside world.
"""
