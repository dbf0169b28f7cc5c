"""The numbers that every way of running the same training must arrive at, and the command that writes them anew:

    python -m tests.integration.golden_losses

They come from one process, without ZeRO, sequence parallelism or FPDT. They change only with the arithmetic of a model,
the optimizer or the data, and then in a commit that says why.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.integration.corpus import write_corpus
from tests.integration.runs import MODELS, Run, base_flags, train

FOLDER = Path(__file__).parent / "golden"
NUM_ITERATIONS = 20
# Some steps are clipped and others are not: Adam hides the scale of the gradients, the mixture does not.
SETTINGS = [
    *["--train-iters", str(NUM_ITERATIONS), "--lr-decay-style", "cosine", "--lr-warmup-iters", "4"],
    *["--clip-grad", "0.72", "--weight-decay", "0.1", "--adam-beta2", "0.95"],
    *["--eval-interval", "10", "--eval-iters", "2"],
]


@dataclass(frozen=True)
class Golden:
    """Losses and gradient norms of iterations 1 to NUM_ITERATIONS, and the validation losses between them."""

    losses: list[float]
    grad_norms: list[float]
    validation_losses: list[float]

    @classmethod
    def of(cls, run: Run) -> "Golden":
        """Take the numbers of a run."""
        return cls(*(list(series.values()) for series in (run.losses, run.grad_norms, run.validation_losses)))

    @classmethod
    def read(cls, model: str) -> "Golden":
        """Read the numbers of a model."""
        return cls(**json.loads((FOLDER / f"{model}.json").read_text()))

    def write(self, model: str) -> None:
        """Store the numbers of a model; nine digits tell every two fp32 numbers apart."""
        series = {name: [float(f"{value:.9g}") for value in values] for name, values in vars(self).items()}
        (FOLDER / f"{model}.json").write_text(json.dumps(series, indent=1) + "\n")


def golden_run(model: str, corpus: Path, folder: Path, extra: Sequence[str] = (), num_ranks: int = 1) -> Golden:
    """Run the training of the golden file with further flags."""
    return Golden.of(train([*base_flags(corpus, MODELS[model]), *SETTINGS, *extra], folder, num_ranks))


def main() -> None:
    """Write the golden file of every model."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        corpus = write_corpus(Path(name) / "numbers")
        for model in MODELS:
            golden = golden_run(model, corpus, Path(name) / model)
            golden.write(model)
            sys.stdout.write(f"{FOLDER / model}.json: loss {golden.losses[0]:.6f} to {golden.losses[-1]:.6f}\n")


if __name__ == "__main__":
    main()
