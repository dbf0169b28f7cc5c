"""GPUs and machines, by the numbers that bound a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

GIB = 2**30
GB = 1e9
TERA = 1e12


@dataclass(frozen=True)
class Gpu:
    """Rates that long kernels sustain inside a block, not peaks of a data sheet, but for `peak_tflops`.

    `attention`: TFLOP/s forward and backward of tiles of 32,768 tokens with heads of 128, by backend, fastest first.
    """

    name: str
    memory_gib: float  # that CUDA reports
    peak_tflops: float
    attention: Mapping[str, tuple[float, float]]
    matmul_tflops: float
    memory_gbps: float  # of its own memory
    link_gbps: float  # to the host, one way
    peer_gbps: float  # all-to-all within a machine

    @property
    def fastest(self) -> str:
        """The fastest backend."""
        return next(iter(self.attention))

    def rated(self, backend: str) -> str | None:
        """The name under which the backend's rates are here: "auto" has the fastest. None where there are none."""
        name = self.fastest if backend == "auto" else SAME_RATES.get(backend, backend)
        return name if name in self.attention else None


# Kernels by other names, and with the same speed.
SAME_RATES = {"flash-2": "torch-flash", "flash-attn-2": "torch-flash"}

# What was measured: of the H200 flash-attn-4, cuDNN and the products (docs/performance.md); of the H100 the kernels
# alone, which stand here less the 4% that those of the H200 lose inside a block, its FlashAttention-2 for the H200 too;
# links and peers on two H200 together, for the H100 too. Memory bandwidths are the data sheets', and all of the A100 is
# assumed: its kernels within the 50 to 73% of the peak that FlashAttention-2's paper reports (arXiv 2307.08691).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "H200", 139.8, 989, {"flash-attn-4": (635, 599), "cudnn": (583, 525), "torch-flash": (330, 310)},
            matmul_tflops=710, memory_gbps=4800, link_gbps=51, peer_gbps=280,
        ),
        Gpu(
            "H100", 79.1, 989, {"flash-attn-4": (660, 605), "cudnn": (605, 535), "torch-flash": (335, 310)},
            matmul_tflops=720, memory_gbps=3350, link_gbps=51, peer_gbps=280,
        ),
        Gpu(
            "A100-80GB", 79.1, 312, {"torch-flash": (205, 185)},
            matmul_tflops=250, memory_gbps=2039, link_gbps=24, peer_gbps=200,
        ),
    )
}  # fmt: skip


SLOWEST = "A100-80GB"


def gpu_like(device_name: str, memory_bytes: int) -> Gpu:
    """The GPU that CUDA calls `device_name`, with the memory given; one that is not known counts as the slowest."""
    known = (gpu for name, gpu in GPUS.items() if name.partition("-")[0] in device_name)
    return replace(next(known, GPUS[SLOWEST]), memory_gib=memory_bytes / GIB)


@dataclass(frozen=True)
class Machines:
    """`num_gpus` GPUs on machines of `gpus_per_node`, with host memory and network per machine."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    host_memory_gib: float
    network_gbps: float = 50.0  # per GPU, between machines

    @property
    def num_nodes(self) -> int:
        return -(-self.num_gpus // self.gpus_per_node)

    @property
    def host_bytes_per_gpu(self) -> float:
        """A GPU's share of its machine's host memory."""
        return self.host_memory_gib * GIB / min(self.gpus_per_node, self.num_gpus)

    def exchange_gbps(self, num_ranks: int) -> float:
        """What a GPU sends and receives in a collective over so many neighbouring ranks."""
        return self.gpu.peer_gbps if num_ranks <= self.gpus_per_node else self.network_gbps
