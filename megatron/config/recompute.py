"""Choice of the matrix products that the backward pass of a streamed block recomputes."""

from enum import StrEnum


class Recompute(StrEnum):
    """Matrix products of a block that its backward pass recomputes, from the lowest memory to the fastest.

    The outputs of the others are saved. The last product of a block is neither recomputed nor saved: nothing reads it.
    """

    KV = "kv"
    """All, and those before attention twice: keys and values are not saved."""

    ALL = "all"
    """All; keys and values are saved."""

    MLP = "mlp"
    """Those of the MLP; the outputs of the projections before and after attention are saved too."""

    NONE = "none"
    """None; the output of the MLP's first layer is saved too."""

    @property
    def saves_keys_and_values(self) -> bool:
        return self is not Recompute.KV

    @property
    def saves_products(self) -> bool:
        """Whether the outputs of the projections before and after attention are saved."""
        return self in (Recompute.MLP, Recompute.NONE)

    @property
    def saves_mlp_products(self) -> bool:
        return self is Recompute.NONE
