"""Hardware model: the memory sizes and rates of GPUs and machines that bound a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron.core.link_rates import LinkRates
from megatron.fpdt.memory_model import FlopsPerByte

GIB = 2**30
GB = 1e9
TERA = 1e12


@dataclass(frozen=True)
class Gpu:
    """Rates that long kernels sustain inside a block, not data-sheet peaks, except for `peak_tflops`.

    `attention`: TFLOP/s forward and backward of tiles of 32,768 tokens with heads of 128, by backend, fastest first.
    `links`: to the host, by the number of GPUs of a machine that copy at once.
    """

    name: str
    memory_gib: float  # as CUDA reports it
    peak_tflops: float
    attention: Mapping[str, tuple[float, float]]
    matmul_tflops: float
    memory_gbps: float  # of its own memory
    links: Mapping[int, LinkRates]
    peer_gbps: float  # all-to-all within a machine

    @property
    def fastest(self) -> str:
        """The fastest backend."""
        return next(iter(self.attention))

    def rated(self, backend: str) -> str | None:
        """Return the key of a backend in `attention`: the fastest for "auto", None where it has no rates."""
        name = self.fastest if backend == "auto" else SAME_RATES.get(backend, backend)
        return name if name in self.attention else None

    def link(self, num_gpus: int) -> LinkRates:
        """Return the link of a machine with so many GPUs: of the next larger number known, or else the largest."""
        return self.links[min((n for n in self.links if n >= num_gpus), default=max(self.links))]


# Kernels with the same speed as another.
SAME_RATES = {"flash-2": "torch-flash", "flash-attn-2": "torch-flash"}

# Sources of the rates. H200: flash-attn-4, cuDNN and the products are measured (docs/performance.md). H100: the kernels
# are measured alone, and reduced here by the 4% that those of the H200 lose inside a block; its FlashAttention-2 rate
# serves the H200 too. Links are measured on one, two and four H200 at work at once, except for the rate of four to the
# host, which is taken to be that to the GPU. Peers are measured on two H200. Both serve the H100 too. Memory bandwidths
# are from the data sheets. A100: all rates are assumed, with kernels within the 50 to 73% of the peak that the
# FlashAttention-2 paper reports (arXiv 2307.08691).
HOPPER_LINKS = {1: LinkRates(51, 52, 82), 2: LinkRates(51, 52, 67), 4: LinkRates(43, 43, 41)}
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "H200", 139.8, 989, {"flash-attn-4": (635, 599), "cudnn": (583, 525), "torch-flash": (330, 310)},
            matmul_tflops=710, memory_gbps=4800, links=HOPPER_LINKS, peer_gbps=280,
        ),
        Gpu(
            "H100", 79.1, 989, {"flash-attn-4": (660, 605), "cudnn": (605, 535), "torch-flash": (335, 310)},
            matmul_tflops=720, memory_gbps=3350, links=HOPPER_LINKS, peer_gbps=280,
        ),
        Gpu(
            "A100-80GB", 79.1, 312, {"torch-flash": (205, 185)},
            matmul_tflops=250, memory_gbps=2039, links={1: LinkRates(24, 24, 31)}, peer_gbps=200,
        ),
    )
}  # fmt: skip


SLOWEST = "A100-80GB"
BLOCK_OVER_MATMUL = 0.85  # FLOP/s of a block's forward pass over those of its matrix products alone


def gpu_like(device_name: str, memory_bytes: int) -> Gpu:
    """Return the GPU that CUDA calls `device_name`, with the given memory; an unknown one counts as the slowest."""
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
    measured_link: LinkRates | None = None

    @property
    def num_nodes(self) -> int:
        return -(-self.num_gpus // self.gpus_per_node)

    @property
    def link(self) -> LinkRates:
        """The link of each GPU to its host, all of a machine copying at once."""
        return self.measured_link or self.gpu.link(min(self.gpus_per_node, self.num_gpus))

    @property
    def flops_per_byte(self) -> FlopsPerByte:
        """FLOPs of a block's compute in the time of a copied byte."""
        flops = self.gpu.matmul_tflops * BLOCK_OVER_MATMUL * TERA / GB
        return FlopsPerByte(flops / self.link.to_host, flops / self.link.both_ways)

    @property
    def host_bytes_per_gpu(self) -> float:
        """A GPU's share of its machine's host memory."""
        return self.host_memory_gib * GIB / min(self.gpus_per_node, self.num_gpus)

    def exchange_gbps(self, num_ranks: int) -> float:
        """Rate in GB/s at which a GPU sends and receives in a collective over `num_ranks` neighboring ranks."""
        return self.gpu.peer_gbps if num_ranks <= self.gpus_per_node else self.network_gbps
