"""What the benchmarks share: flags, clocks, the table, and the files that they leave.

Every rate stands beside that of a bf16 matrix product of 8192 x 8192 x 8192 on random data of the same run: "x matmul"
is the ratio of the two. The product is timed 20 times in a row, and the header has its rate in a long row beside it,
which is lower where a GPU does not hold its clock for the seconds that a block takes. The medians are over repeats
after a warm-up; "spread" is the slowest repeat over the fastest, less one.
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
from megatron.fpdt.host_pool import HostMemoryError
from megatron.ops.attention import AttentionUnavailable

REPOSITORY = Path(__file__).resolve().parents[1]
GIB = 2**30
SUSTAINED_PRODUCTS = 1000  # more than a second on an H200
PACKAGES = ("deepspeed", "triton", "flash-attn", "flash-attn-3", "flash-attn-4")

Row = dict[str, Any]


@dataclass(frozen=True)
class Geometry:
    """Widths of one LLaMA block; those of Llama-3-8B by default."""

    hidden_size: int = 4096
    ffn_hidden_size: int = 14336
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    kv_channels: int = 128

    def model_config(self, seq_length: int, backend: str = "auto", num_layers: int = 1) -> ModelConfig:
        """A model of such blocks for sequences of `seq_length` tokens."""
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
    """A parser with the flags of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu runs a tiny case in seconds, to try the script; its times mean nothing")  # fmt: skip
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
    """The block that the flags of `add_geometry_flags` describe."""
    return Geometry(**{name: getattr(arguments, name) for name in vars(Geometry())})


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, quick: dict[str, Any], tiny: dict[str, Any]
) -> argparse.Namespace:
    """Parse; `quick` and `tiny` replace defaults under --quick and --device cpu. Exits without the device asked for."""
    chosen, _ = parser.parse_known_args(argv)
    if chosen.device == "cpu":
        parser.set_defaults(**tiny)
    elif chosen.quick:
        parser.set_defaults(**quick)
    arguments = parser.parse_args(argv)
    arguments.words = list(sys.argv[1:] if argv is None else argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, f"{parser.prog}: no GPU is visible to torch; --device cpu tries the script on a tiny case\n")
    return arguments


def run_script(main: Callable[[], int]) -> int:
    """Exit code of a benchmark; what its user can mend is one line."""
    try:
        return main()
    except (ConfigError, AttentionUnavailable) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds from an idle device to an idle device."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def kernel_seconds(work: Callable[[], Any], device: torch.device, repeats: int, warm_ups: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls queued one after the other, by the GPU's own clock."""
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
    """Rate of the yardstick: the median of products of random matrices. On a CPU they are small, and fp32."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=compute_dtype(device)) for _ in range(2))
    return 2 * size**3 / statistics.median(kernel_seconds(lambda: a @ b, device, repeats, warm_ups=5)) / 1e12


def spread(seconds: Sequence[float]) -> float:
    """Slowest over fastest, less one."""
    return max(seconds) / min(seconds) - 1


def allocated_bytes(device: torch.device) -> int:
    """Bytes of live tensors on a GPU; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Start a new peak at what is allocated now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes of live tensors since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def peak_process_bytes() -> int:
    """Most host memory that this process has held; getrusage would count its parent's from before it began."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def gib(num_bytes: int | None) -> float | None:
    """GiB, or None where the bytes are not known."""
    return None if num_bytes is None else num_bytes / GIB


def free_memory(device: torch.device) -> None:
    """Give back what earlier cases have left: GPU memory to the device, host slabs to the machine."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def attempt(measure: Callable[[], Row], device: torch.device) -> Row:
    """The row measured, or one that says which memory ran out."""
    try:
        row = measure()
    except torch.OutOfMemoryError:
        row = {"failed": "out of GPU memory"}
    except HostMemoryError:
        row = {"failed": "out of host memory"}
    free_memory(device)
    return row


def describe_run(name: str, arguments: argparse.Namespace, device: torch.device) -> Row:
    """What a reader needs to judge the numbers: hardware, versions, commit, command, and the yardstick's rate."""
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
    """Short hash of the checkout, marked where files differ from it; "unknown" outside git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(repository), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Column:
    """One column of a table: a row's key, the title, the format of its values, and room for long ones."""

    key: str
    title: str
    format: str = ""
    width: int = 7

    def text(self, row: Row) -> str:
        """The row's value; n/a where it is not known, nothing where the row failed."""
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
    """Lines of equal width, one per row as it comes."""

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
    """Prints each row as it comes and keeps OUTPUT.json up to date, so that a run cut short loses no row."""

    def __init__(self, name: str, arguments: argparse.Namespace, columns: Sequence[Column]) -> None:
        """Measure the yardstick and print the heading."""
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
        """The yardstick's rate in TFLOP/s."""
        return float(self.header["matmul_tflops"])

    def add(self, row: Row) -> None:
        """Print a row and write it."""
        self.rows.append(row)
        print(self._table.line(row), flush=True)
        self.write()

    def finish(self) -> None:
        """Measure the yardstick again: a GPU whose clock has fallen since the start shows it here."""
        again = matmul_tflops(self.device)
        self.write(matmul_tflops_at_end=again)
        print(f"\nmatrix product at the end {again:.3g} TFLOP/s")

    def write(self, **more: Any) -> None:
        """Write OUTPUT.json; `more` joins the header."""
        self.header |= more
        path = self._output.with_name(self._output.name + ".json")
        path.write_text(json.dumps({**self.header, "rows": self.rows}, indent=2) + "\n")

    @contextmanager
    def picture(self, num_panels: int) -> Iterator[Any]:
        """The axes of OUTPUT.png, side by side; what ran is written above them."""
        with picture(self._output.with_name(self._output.name + ".png"), num_panels, self.title()) as axes:
            yield axes

    def title(self) -> str:
        """Hardware, torch and commit in a line."""
        return f"{self.header['device']}, torch {self.header['torch']}, commit {self.header['commit']}"


@contextmanager
def picture(path: Path, num_panels: int, title: str) -> Iterator[Any]:
    """Axes to draw on, saved to `path` at the end."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, num_panels, figsize=(6 * num_panels, 4.5), layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=9)
    yield axes[0]
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def token_axis(panel: Any, label: str) -> None:
    """Tokens along x, doubling from tick to tick."""
    panel.set_xlabel(label)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda num_tokens, _: thousands(int(num_tokens)))


def thousands(num_tokens: int) -> str:
    """131072 as "128K", 1048576 as "1M", and anything that is no multiple of 1024 as it is."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if num_tokens % size == 0 and num_tokens:
            return f"{num_tokens // size}{unit}"
    return str(num_tokens)
