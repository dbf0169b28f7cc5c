"""Settings for datasets, sample order and document boundaries."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data."""

    data_path: tuple[str, ...] = ()
    """One dataset prefix (PREFIX.bin and PREFIX.idx), or pairs of weight and prefix to blend. For
    finetune_llama.py: one or more files of conversations (JSON lines, one JSON array, Parquet) or folders that
    save_to_disk of Hugging Face datasets wrote."""

    split: str = "969, 30, 1"
    """Shares of the documents for training, validation and test."""

    train_data_path: tuple[str, ...] = ()
    """Dataset for training only, in place of --data-path and --split."""

    valid_data_path: tuple[str, ...] = ()
    """Dataset for validation only."""

    test_data_path: tuple[str, ...] = ()
    """Dataset for testing only."""

    data_cache_path: str | None = None
    """Folder for sample indices, and for the tokens of conversations. Default: a folder next to the data."""

    prefetch_microbatches: int = 2
    """Micro-batches that a thread prefetches; with 0 each is built when it is needed."""

    reset_position_ids: bool = False
    """Restart positions at 0 after each end of document."""

    reset_attention_mask: bool = False
    """Restrict attention to tokens of the same document; attention across documents is not computed."""

    eod_mask_loss: bool = False
    """Exclude the token after an end of document from the loss."""

    @property
    def separates_documents(self) -> bool:
        """Whether an end of document changes positions, attention or the loss."""
        return self.reset_position_ids or self.reset_attention_mask or self.eod_mask_loss
