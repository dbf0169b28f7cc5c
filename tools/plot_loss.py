"""Draw the loss curves of a training log: `python tools/plot_loss.py train.log --output loss.png`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.logging.log_line import IterationRecord, LogRecord, ValidationRecord, parse_log


def main(argv: list[str] | None = None) -> int:
    """Read the log, write the picture, return the exit code."""
    arguments = _parse_arguments(argv)
    try:
        records = _read_records(arguments.log)
        _plot(records, arguments.output, arguments.title or arguments.log.stem)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"plot_loss: {error}\n")
        return 2
    sys.stdout.write(f"{arguments.output}\n")
    return 0


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw the loss curves of a training log.")
    parser.add_argument("log", type=Path, help="text that pretrain_gpt.py printed")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help="picture to write [loss.png]")
    parser.add_argument("--title", help="title of the picture [the log's name]")
    return parser.parse_args(argv)


def _read_records(path: Path) -> list[LogRecord]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        records = list(parse_log(lines))
    if not records:
        raise ValueError(
            f"{path} has no line ` iteration 1/ 100 | ... | lm loss: ...`; give the text that pretrain_gpt.py printed, "
            "for example by `... 2>&1 | tee train.log`."
        )
    return records


def _plot(records: list[LogRecord], output: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    training = [(r.iteration, r.loss) for r in records if isinstance(r, IterationRecord) and r.loss is not None]
    axes.plot(*_columns(training), label="training", linewidth=1.2)
    for part in ("validation", "test"):
        points = [(r.iteration, r.loss) for r in records if isinstance(r, ValidationRecord) and r.part == part]
        if points:
            axes.plot(*_columns(points), label=part, marker="o", linestyle="--" if part == "validation" else "none")
    axes.set(title=title, xlabel="iteration", ylabel="loss per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    pyplot.close(figure)


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [iteration for iteration, _ in points], [loss for _, loss in points]


if __name__ == "__main__":
    sys.exit(main())
