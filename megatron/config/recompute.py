"""Choice of what the backward pass of a streamed block recomputes."""

from enum import StrEnum


class Recompute(StrEnum):
    """Matrix products of a block that its backward pass recomputes, from the lowest memory to the fastest.

    The outputs of the others are saved. The last product of a block is neither recomputed nor saved: nothing reads it.
    """

    ATTENTION = "attention"
    """All, and attention: a block saves at most its input."""

    KV = "kv"
    """All, and those before attention twice: keys and values are not saved."""

    ALL = "all"
    """All; keys and values are saved."""

    MLP = "mlp"
    """Those of the MLP; the outputs of the projections before and after attention are saved too."""

    NONE = "none"
    """None; the output of the MLP's first layer is saved too."""

    @property
    def saves_attention(self) -> bool:
        """Whether the output and log-sum-exp of attention are saved."""
        return self is not Recompute.ATTENTION

    @property
    def saves_keys_and_values(self) -> bool:
        return self not in (Recompute.ATTENTION, Recompute.KV)

    @property
    def saves_products(self) -> bool:
        """Whether the outputs of the projections before and after attention are saved."""
        return self in (Recompute.MLP, Recompute.NONE)

    @property
    def saves_mlp_products(self) -> bool:
        return self is Recompute.NONE
