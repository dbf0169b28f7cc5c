"""The Fully Pipelined Distributed Transformer: causal blocks executed as streams of chunks (arXiv 2408.16978).

plan        which tiles there are, in which order
host_pool   host memory, pinned once and reused for ever
store       chunks moving between device and host, and the only code that knows streams
block       one transformer block, forward and backward, chunk by chunk
tokenwise   the embedding, chunk by chunk
loss        final norm, LM head and cross-entropy, tile by tile
"""
