"""The Fully Pipelined Distributed Transformer: causal blocks executed as streams of chunks (arXiv 2408.16978).

plan             the tiles and their order of execution
host_pool        pool of pinned host memory, pinned once and reused
tiers            storage tiers, device and host; the only code that knows the copy streams
store            places chunks on the tiers, offloads and prefetches them
memory_model     estimate of the bytes of all chunks, and the choice of what to save for backward
device_budget    device memory for chunks, shared out by what they hold
placement        which chunks of a step are on the device, and which on the host
observer         what an observer of a run sees of it
stream           what all streamed parts of a model share
seam             a layer suspended at its attention call, and resumed with the output
layer_trace      the matrix products of a layer that its backward pass needs
streamed_layer   runs of a layer on a slice of tokens
block            one transformer block as an autograd function
forward_pass     its forward pass, chunk by chunk
saved            what the forward pass saves for backward
backward_pass    its backward pass, chunk by chunk
block_chain      the blocks of a sequence, and how one follows another
block_inputs     block inputs that are rebuilt instead of saved
attention_tiles  a row of attention tiles
random_state     replay of random numbers in recomputation
tokenwise        the embedding, chunk by chunk
loss             final norm, LM head and cross-entropy, tile by tile
"""
