"""Shared parts of the benchmarks: flags, timers, the table, and the output files.

Every rate is compared with that of a bf16 matmul of 8192 x 8192 x 8192 on random data in the same run: "x matmul" is
the ratio of the two. The matmul is timed 20 times in a row. The header also has its sustained rate over a long row,
which is lower where a GPU does not hold its clock for the seconds that a block takes. Medians are over repeats after a
warm-up; "spread" is the slowest repeat over the fastest, minus one.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.config import ConfigError, ModelConfig
from megatron.config.packages import require_package
from megatron.fpdt.disk_files import DiskError
from megatron.fpdt.host_pool import HostMemoryError
from megatron.ops.attention import AttentionUnavailable

REPOSITORY = Path(__file__).resolve().parents[1]
GIB = 2**30
SUSTAINED_PRODUCTS = 1000  # more than a second on an H200
PACKAGES = ("deepspeed", "triton", "flash-attn", "flash-attn-3", "flash-attn-4")

Row = dict[str, Any]


@dataclass(frozen=True)
class Geometry:
    """The widths of one LLaMA block; Llama-3-8B's by default."""

    hidden_size: int = 4096
    ffn_hidden_size: int = 14336
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    kv_channels: int = 128

    def model_config(self, seq_length: int, backend: str = "auto", num_layers: int = 1) -> ModelConfig:
        """Return the config of a model with such blocks for sequences of `seq_length` tokens."""
        return ModelConfig(
            num_layers=num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            kv_channels=self.kv_channels,
            seq_length=seq_length,
            use_rotary_position_embeddings=True,
            rotary_position_embeddings_theta=500000.0,
            normalization="rmsnorm",
            swiglu=True,
            disable_bias_linear=True,
            untie_embeddings_and_output_weights=True,
            attention_backend=backend,  # type: ignore[arg-type]
        ).resolved()


TINY_GEOMETRY = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "kv_channels": 16}  # fmt: skip


def build_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu runs a tiny case in seconds, to try the script; ignore its times")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer and shorter cases, unless flags name them")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks") / name,
                        help="writes OUTPUT.json and OUTPUT.png [%(default)s]")  # fmt: skip
    parser.add_argument("--commit", help="commit to name in the JSON [git's]")
    return parser


def add_geometry_flags(parser: argparse.ArgumentParser, default: Geometry) -> None:
    """Add a flag per width of a block."""
    for name, value in vars(default).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="[%(default)s]")


def geometry_of(arguments: argparse.Namespace) -> Geometry:
    """Return the block that the flags of `add_geometry_flags` describe."""
    return Geometry(**{name: getattr(arguments, name) for name in vars(Geometry())})


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, quick: dict[str, Any], tiny: dict[str, Any]
) -> argparse.Namespace:
    """Parse; `quick` and `tiny` replace defaults with --quick and --device cpu. Exits if the device is missing.

    Raises ConfigError if the package that draws OUTPUT.png is not installed.
    """
    chosen, _ = parser.parse_known_args(argv)
    if chosen.device == "cpu":
        parser.set_defaults(**tiny)
    elif chosen.quick:
        parser.set_defaults(**quick)
    arguments = parser.parse_args(argv)
    arguments.words = list(sys.argv[1:] if argv is None else argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, f"{parser.prog}: no GPU is visible to torch; --device cpu tries the script on a tiny case\n")
    require_package("matplotlib", f"the picture of {parser.prog}")
    return arguments


def run_script(main: Callable[[], int]) -> int:
    """Run a benchmark and return its exit code; an error that the user can fix is one line."""
    try:
        return main()
    except (ConfigError, AttentionUnavailable, DiskError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Time `work` in seconds, from an idle device to an idle device."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def kernel_seconds(work: Callable[[], Any], device: torch.device, repeats: int, warm_ups: int = 1) -> list[float]:
    """Time each of `repeats` calls, queued back to back, in seconds by the GPU's own clock."""
    for _ in range(warm_ups):
        work()
    if device.type != "cuda":
        return [wall_seconds(work, device) for _ in range(repeats)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def matmul_tflops(device: torch.device, repeats: int = 20) -> float:
    """Measure the reference rate: the median over matmuls of random matrices. On a CPU they are small, and fp32."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=compute_dtype(device)) for _ in range(2))
    return 2 * size**3 / statistics.median(kernel_seconds(lambda: a @ b, device, repeats, warm_ups=5)) / 1e12


def spread(seconds: Sequence[float]) -> float:
    """Return the slowest over the fastest, minus one."""
    return max(seconds) / min(seconds) - 1


def allocated_bytes(device: torch.device) -> int:
    """Return the bytes of live tensors on a GPU; 0 on a CPU, where they are not counted."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Reset the peak to the bytes allocated now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak bytes of live tensors since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reserved_bytes(device: torch.device) -> int | None:
    """Return the peak bytes that torch's allocator took from a GPU since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def peak_process_bytes() -> int:
    """Return the peak host memory of this process; getrusage would count its parent's from before the fork."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def gib(num_bytes: int | None) -> float | None:
    """Convert bytes to GiB; None stays None."""
    return None if num_bytes is None else num_bytes / GIB


def free_memory(device: torch.device) -> None:
    """Release the memory of earlier cases: GPU memory to the device, host slabs to the machine."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def attempt(measure: Callable[[], Row], device: torch.device) -> Row:
    """Return the measured row, or one that says which memory ran out."""
    try:
        row = measure()
    except torch.OutOfMemoryError:
        row = {"failed": "out of GPU memory"}
    except HostMemoryError:
        row = {"failed": "out of host memory"}
    free_memory(device)
    return row


def describe_run(name: str, arguments: argparse.Namespace, device: torch.device) -> Row:
    """Describe the run of the numbers: hardware, versions, commit, command, and the reference matmul's rate."""
    on_gpu = device.type == "cuda"
    return {
        "benchmark": name,
        "command": shlex.join(["python", f"benchmarks/{name}.py", *arguments.words]),
        "commit": arguments.commit or git_commit(REPOSITORY),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "packages": {name: version for name in PACKAGES if (version := installed_version(name))},
        "arguments": {name: value for name, value in vars(arguments).items() if name not in ("words", "output")},
        "matmul_tflops": matmul_tflops(device),
        "matmul_tflops_sustained": matmul_tflops(device, SUSTAINED_PRODUCTS),
    }


def git_commit(repository: Path) -> str:
    """Return the short hash of the checkout, marked if files have changed; "unknown" outside git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(repository), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Column:
    """One column of a table: a row's key, the title, the format of its values, and the minimum width."""

    key: str
    title: str
    format: str = ""
    width: int = 7

    def text(self, row: Row) -> str:
        """Format the row's value; n/a where it is unknown, empty where the row failed."""
        value = row.get(self.key)
        if value is None:
            return "" if "failed" in row else "n/a"
        return f"{value:{self.format}}"


SPEED_COLUMNS = (
    Column("forward_seconds", "forward s", ".3f"),
    Column("backward_seconds", "backward s", ".3f"),
    Column("model_tflops", "model TFLOP/s", ".0f"),
    Column("times_matmul", "x matmul", ".3f"),
    Column("spread", "spread", ".1%"),
)


class Table:
    """Lines of equal width, one per row."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns
        self._widths = [max(len(column.title), column.width) for column in columns]

    def heading(self) -> str:
        return self._line([column.title for column in self.columns])

    def line(self, row: Row) -> str:
        text = self._line([column.text(row) for column in self.columns])
        return f"{text.rstrip()}  {row['failed']}" if "failed" in row else text

    def _line(self, texts: Sequence[str]) -> str:
        first, *others = zip(texts, self._widths, strict=True)
        return "  ".join([f"{first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in others)])


class Report:
    """Prints each row at once and keeps OUTPUT.json up to date, so that an interrupted run loses no row."""

    def __init__(self, name: str, arguments: argparse.Namespace, columns: Sequence[Column]) -> None:
        """Measure the reference matmul and print the heading."""
        self.device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
        self.header = describe_run(name, arguments, self.device)
        self.rows: list[Row] = []
        self._output, self._table = arguments.output, Table(columns)
        self._output.parent.mkdir(parents=True, exist_ok=True)
        what = (
            "8192^3 bf16 matrix product"
            if self.device.type == "cuda"
            else "times of GPU work mean nothing; matrix product"
        )
        print(f"{self.header['device']}, torch {self.header['torch']}, commit {self.header['commit']}")
        sustained = self.header["matmul_tflops_sustained"]
        print(f"{what} {self.matmul:.3g} TFLOP/s, {sustained:.3g} when {SUSTAINED_PRODUCTS} run in a row\n")
        print(self._table.heading(), flush=True)

    @property
    def matmul(self) -> float:
        """The rate of the reference matmul in TFLOP/s."""
        return float(self.header["matmul_tflops"])

    def add(self, row: Row) -> None:
        """Print a row and write it."""
        self.rows.append(row)
        print(self._table.line(row), flush=True)
        self.write()

    def finish(self) -> None:
        """Measure the reference matmul again, which shows whether the GPU's clock has dropped since the start."""
        again = matmul_tflops(self.device)
        self.write(matmul_tflops_at_end=again)
        print(f"\nmatrix product at the end {again:.3g} TFLOP/s")

    def write(self, **more: Any) -> None:
        """Write OUTPUT.json; `more` is added to the header."""
        self.header |= more
        path = self._output.with_name(self._output.name + ".json")
        path.write_text(json.dumps({**self.header, "rows": self.rows}, indent=2) + "\n")

    @contextmanager
    def picture(self, num_panels: int) -> Iterator[Any]:
        """Yield the axes of OUTPUT.png, side by side, under a title with hardware and versions."""
        with picture(self._output.with_name(self._output.name + ".png"), num_panels, self.title()) as axes:
            yield axes

    def title(self) -> str:
        """Return hardware, torch version and commit in one line."""
        return f"{self.header['device']}, torch {self.header['torch']}, commit {self.header['commit']}"


@contextmanager
def picture(path: Path, num_panels: int, title: str) -> Iterator[Any]:
    """Yield axes to draw on, and save them to `path` at the end."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, num_panels, figsize=(6 * num_panels, 4.5), layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=9)
    yield axes[0]
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def token_axis(panel: Any, label: str) -> None:
    """Label x with tokens, on a log2 scale."""
    panel.set_xlabel(label)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda num_tokens, _: thousands(int(num_tokens)))


def thousands(num_tokens: int) -> str:
    """Format 131072 as "128K", 1048576 as "1M", and other than multiples of 1024 in full."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if num_tokens % size == 0 and num_tokens:
            return f"{num_tokens // size}{unit}"
    return str(num_tokens)
