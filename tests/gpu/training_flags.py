"""Flags of the small runs that train on a GPU."""

from pathlib import Path

from tests.integration.runs import LLAMA, TOKENIZER

MODEL = ["--num-layers", "2", "--hidden-size", "256", "--num-attention-heads", "4", "--seq-length", "512", *LLAMA]
TRAINING = ["--global-batch-size", "4", "--lr", "1e-3", "--eval-iters", "0", "--log-interval", "1"]
STREAMED = ["--ds-sequence-parallel-fpdt", "--ds-sequence-parallel-fpdt-chunk-size", "160"]
OFFLOADED = [*STREAMED, "--ds-sequence-parallel-fpdt-offloading", "--ds-sequence-parallel-fpdt-device-memory", "0"]
KEPT = [*OFFLOADED, "--ds-sequence-parallel-fpdt-recompute", "none"]
ON_HOST = {
    "stage": 3,
    "offload_optimizer": {"device": "cpu", "pin_memory": True},
    "offload_param": {"device": "cpu", "pin_memory": True},
}


def training_words(corpus: Path, iterations: int, *flags: str) -> list[str]:
    """Return the words of a run on a corpus; `flags` win over those before them."""
    data = ["--data-path", str(corpus), "--split", "90,6,4", "--train-iters", str(iterations)]
    return [*MODEL, *TOKENIZER, *TRAINING, *data, *flags]
