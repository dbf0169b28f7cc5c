"""GPUs by name, and by what is known of one without a name."""

import pytest

from megatron.config import ConfigError
from megatron.planner.hardware import GPUS, gpu_called, gpu_of_data_sheet


@pytest.mark.parametrize(
    "text, name",
    [
        ("h100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("H100 PCIe", "H100-PCIe"),
        ("A100 40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 5090", "RTX-5090"),
        ("rtx3090", "RTX-3090"),
        ("6000 Ada", "RTX-6000-Ada"),
        ("l4", "L4"),
    ],
)
def test_a_gpu_has_the_name_that_people_give_it(text, name):
    assert gpu_called(text).name == name


# Memory in GB, its bandwidth in GB/s, and the dense bf16 peak in TFLOP/s, as their makers state them.
DATA_SHEETS = {
    "H200": (141, 4800, 989), "H100": (80, 3350, 989), "H100-NVL": (94, 3900, 835), "H100-PCIe": (80, 2000, 756),
    "GH200": (96, 4000, 989), "B200": (180, 7700, 2250), "GB200": (186, 8000, 2500), "A100-80GB": (80, 2039, 312),
    "A100-40GB": (40, 1555, 312), "L40S": (48, 864, 362), "L4": (24, 300, 121), "A10": (24, 600, 125),
    "RTX-PRO-6000-Blackwell": (96, 1792, 503.8), "RTX-6000-Ada": (48, 960, 364.2), "RTX-A6000": (48, 768, 154.8),
    "RTX-5090": (32, 1792, 209.5), "RTX-4090": (24, 1008, 165.2), "RTX-3090": (24, 936, 71.2),
}  # fmt: skip


def test_figures_of_gpus_are_those_of_their_data_sheets():
    assert set(DATA_SHEETS) == set(GPUS)
    for name, (size, bandwidth, peak) in DATA_SHEETS.items():
        gpu = GPUS[name]
        assert 0.91 * size < gpu.memory_gib < size
        assert gpu.memory_gbps == bandwidth
        assert gpu.peak_tflops == pytest.approx(peak, rel=0.003)


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_is_called_by_its_name_and_has_plausible_rates(name):
    gpu = gpu_called(name)
    assert gpu.name == name
    assert gpu.is_measured is (name in ("H100", "H200"))
    forward, backward = gpu.attention[gpu.fastest]
    assert 0.45 * gpu.peak_tflops < backward < forward < 0.7 * gpu.peak_tflops
    assert 0.65 * gpu.peak_tflops < gpu.matmul_tflops <= 0.81 * gpu.peak_tflops


@pytest.mark.parametrize(
    "text, words",
    [
        ("MI300X", "is AMD's"),
        ("Gaudi 3", "is Intel's"),
        ("TPU v5p", "is Google's"),
        ("M3 Max", "is Apple's"),
        ("Trainium2", "is Amazon's"),
        ("V100", "has no bf16"),
        ("A100", "names several GPUs; use one of A100-80GB, A100-40GB"),
        ("Voodoo", "or --gpu-memory and --gpu-tflops"),
        ("", "names no GPU known here"),
    ],
)
def test_others_are_refused_with_the_reason(text, words):
    with pytest.raises(ConfigError, match=rf"--gpu \({text}\) ") as refusal:
        gpu_called(text)
    assert words in str(refusal.value)


def test_a_gpu_without_a_name_is_no_faster_than_one_of_its_data_sheet():
    known, described = GPUS["RTX-4090"], gpu_of_data_sheet(23.6, 165.2)
    assert described.attention == known.attention
    assert described.matmul_tflops == known.matmul_tflops
    assert described.memory_gbps < known.memory_gbps
