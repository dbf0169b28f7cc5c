"""Sizes of a model that its memory, FLOPs and time depend on, whether flags or a folder describe it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """Weights that a token meets in the matrix products of all blocks, by what the backward pass does with a product.

    Each weight costs 2 FLOPs per token in the forward pass.
    """

    before: int
    """Before attention."""

    output: int
    """Of attention's output projection, unless it is among `last`."""

    mlp: int
    """After it, where the backward pass needs the output."""

    last: int
    """After attention, where the backward pass does not need the output, so that it is not recomputed."""

    unsaved: int = 0
    """Of experts and routers: recomputed, whatever is saved of the others."""

    @property
    def after(self) -> int:
        """Weights of all products after attention."""
        return self.output + self.mlp + self.last + self.unsaved

    @property
    def total(self) -> int:
        return self.before + self.after


@dataclass(frozen=True, kw_only=True)
class AdapterSizes:
    """Sizes of the adapters of a model, whose other weights are frozen. Widths are those of the widest block."""

    weights: int
    """Weights of the adapters of all blocks: what is trained."""

    block_weights: int
    """The same of the block with most of them."""

    saved_outputs: int
    """Outputs of the adapters' products per token that can be saved."""

    outputs: int
    """Outputs of the adapters per token, and what autograd saves of them."""

    added_stacks: int
    """Weights of the stacks of experts that a block adds adapters to whenever it runs."""

    quantized_weights: int = 0
    """Frozen weights of all blocks that are stored in 4 bits."""

    quantized_block_weights: int = 0
    """The same of the block with most of them."""

    largest_quantized: int = 0
    """Weights of the largest tensor among them, which a product dequantizes."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of a model. Weights are those of matrices: norms and biases are not counted.

    Widths are in elements per token, those of the widest block.
    """

    all_block_weights: int
    """Weights of all blocks, with every expert."""

    block_weights: int
    """Weights of the largest block, with every expert."""

    largest_stack: int = 0
    """Weights of the largest tensor of experts; 0 without experts."""

    outer_weights: int
    """Weights outside the blocks besides the word embedding and the output layer, such as a table of positions."""

    token_weights: TokenWeights

    projection_width: int
    """Outputs of all products before attention."""

    normalizes_products: bool
    """Whether the backward pass needs the outputs of products before attention, as a norm of queries and keys does."""

    saves_output: bool
    """Whether the backward pass needs the output of attention's output projection."""

    saved_mlp_outputs: int
    """Outputs of the MLP's products that the backward pass needs, and that can be saved."""

    mlp_outputs: int
    """The same with those of a token's experts, and with the copies of a token for its experts."""

    mlp_width: int
    """Inputs of the MLP's last product, of all experts of a token together."""

    expert_traffic: int = 0
    """Elements per token that kernels of the experts other than products read and write in a forward and a backward
    pass, the mean of all blocks; 0 where none were counted."""

    narrow_channels: int
    """Width of a value head, or of a query head if that is narrower; `kv_channels` is that of the wider."""

    softcap: float | None = None
    """Cap of the attention scores; None without."""

    windows: tuple[int | None, ...] = ()
    """By block, the tokens that its sliding window reaches back, the token itself included. Empty without windows."""

    local_blocks: tuple[int | None, ...] = ()
    """By block, the length of the parts of the sequence that attend within themselves. Empty without such parts."""

    adapters: AdapterSizes | None = None
    """Sizes of the adapters, where these alone are trained."""

    def attention_share(self, seq_length: int, documents: float = 1.0) -> float:
        """Return the share of causal attention over the whole sequence that the blocks compute, their mean.

        `documents` is the share that documents leave of it; of this and a window's share the smaller one counts.
        """
        if not self.windows and not self.local_blocks:
            return documents
        num_blocks = max(len(self.windows), len(self.local_blocks))
        shares = [documents] * num_blocks
        for index, window in enumerate(self.windows):
            if window is not None and window < seq_length:
                shares[index] = min(shares[index], 1.0 - (1.0 - window / seq_length) ** 2)
        for index, length in enumerate(self.local_blocks):
            if length is not None and length < seq_length:
                shares[index] = min(shares[index], length / seq_length)
        return sum(shares) / num_blocks
