"""The Fully Pipelined Distributed Transformer: causal blocks executed as streams of chunks (arXiv 2408.16978).

plan             which tiles there are, in which order
host_pool        host memory, pinned once and reused
store            chunks moving between device and host, and the only code that knows CUDA streams
memory_model     how many bytes chunks take, and what is saved for backward
stream           what all streamed pieces of a model share
seam             a layer suspended at its attention call, and resumed with the output
layer_trace      which products of a layer its backward pass needs
streamed_layer   the runs of a layer on a slice of tokens
block            one transformer block as an autograd function
forward_pass     its forward pass, chunk by chunk
saved            what that saves for the backward pass
backward_pass    its backward pass, chunk by chunk
block_inputs     inputs of blocks that are rebuilt instead of saved
attention_tiles  a row of attention tiles
random_state     random numbers drawn again
tokenwise        the embedding, chunk by chunk
loss             final norm, LM head and cross-entropy, tile by tile
"""
