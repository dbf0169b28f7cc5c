"""Where the samples come from."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data."""

    data_path: tuple[str, ...] = ()
    """One dataset prefix (PREFIX.bin and PREFIX.idx), or pairs of weight and prefix to blend. For
    finetune_llama.py: one or more files of conversations, a JSON object per line or one JSON array."""

    split: str = "969, 30, 1"
    """Shares of the documents for training, validation and test."""

    train_data_path: tuple[str, ...] = ()
    """Dataset for training alone, in place of --data-path and --split."""

    valid_data_path: tuple[str, ...] = ()
    """Dataset for validation alone."""

    test_data_path: tuple[str, ...] = ()
    """Dataset for the test alone."""

    data_cache_path: str | None = None
    """Folder for sample indices, and for the tokens of conversations. Default: a folder beside the data."""

    prefetch_microbatches: int = 2
    """Micro-batches that a thread makes ahead of the step; with 0 each is made when it is needed."""

    reset_position_ids: bool = False
    """Positions begin at 0 after each end of document."""

    reset_attention_mask: bool = False
    """Tokens attend to their own document alone; what lies between documents is not computed."""

    eod_mask_loss: bool = False
    """The token after an end of document does not count in the loss."""

    @property
    def separates_documents(self) -> bool:
        """Whether an end of document means anything."""
        return self.reset_position_ids or self.reset_attention_mask or self.eod_mask_loss
