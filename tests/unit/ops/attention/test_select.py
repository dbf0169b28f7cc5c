import pytest
import torch

from megatron.ops.attention import BACKENDS, AttentionUnavailable, choose_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch):
    """Pretend that CUDA device 0 is there; set its capability with the value returned."""
    current = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: current[0])
    return current


def test_names_are_unique_and_the_reference_is_last():
    names = [backend.name for backend in BACKENDS]
    assert len(set(names)) == len(names)
    assert names[-1] == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("head_size", [8, 80, 256, 13])
def test_auto_on_a_cpu_is_torch_s_kernel(dtype, head_size):
    assert choose_backend("auto", CPU, dtype, head_size).name == "torch-cpu"


@pytest.mark.parametrize(
    "device_capability, dtype, head_size, expected",
    [
        ((9, 0), torch.bfloat16, 128, "cudnn"),
        ((10, 0), torch.float16, 64, "cudnn"),
        ((8, 0), torch.bfloat16, 128, "torch-flash"),
        ((9, 0), torch.bfloat16, 256, "torch-flash"),
        ((7, 5), torch.float16, 128, "reference"),
        ((9, 0), torch.float32, 128, "reference"),
        ((9, 0), torch.float64, 128, "reference"),
        ((9, 0), torch.bfloat16, 100, "reference"),
        ((9, 0), torch.bfloat16, 512, "reference"),
    ],
)
def test_auto_on_a_gpu_is_the_fastest_that_is_correct(capability, device_capability, dtype, head_size, expected):
    capability[0] = device_capability
    assert choose_backend("auto", CUDA, dtype, head_size).name == expected


@pytest.mark.parametrize("name", ["torch-cpu", "reference"])
def test_a_name_forces_a_backend(name):
    assert choose_backend(name, CPU, torch.float32, 64).name == name


def test_an_unknown_name_is_refused_with_the_names_that_serve():
    with pytest.raises(AttentionUnavailable) as error:
        choose_backend("fastest", CPU, torch.float32, 64)
    message = "--attention-backend fastest: there is no such backend; use one of auto, torch-cpu, reference."
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["cudnn", "torch-flash"])
def test_a_gpu_kernel_on_a_cpu_is_refused_with_the_reason(name):
    with pytest.raises(AttentionUnavailable, match=f"{name}: it runs on CUDA devices, and the tensors are on cpu; use"):
        choose_backend(name, CPU, torch.bfloat16, 64)


@pytest.mark.parametrize(
    "name, device_capability, dtype, head_size, reason",
    [
        ("torch-cpu", (9, 0), torch.bfloat16, 64, "it runs on CPUs, and the tensors are on cuda"),
        ("cudnn", (8, 9), torch.bfloat16, 64, "it needs compute capability 9.0 or later"),
        ("torch-flash", (7, 5), torch.bfloat16, 64, "it needs compute capability 8.0 or later"),
        ("cudnn", (9, 0), torch.float32, 64, "it computes in bf16 and fp16, and the tensors are torch.float32"),
        ("cudnn", (9, 0), torch.bfloat16, 136, "head size 136 is not a multiple of 8 up to 128"),
        ("torch-flash", (9, 0), torch.bfloat16, 100, "head size 100 is not a multiple of 8 up to 256"),
    ],
)
def test_a_refusal_on_a_gpu_says_why(capability, name, device_capability, dtype, head_size, reason):
    capability[0] = device_capability
    with pytest.raises(AttentionUnavailable) as error:
        choose_backend(name, CUDA, dtype, head_size)
    assert str(error.value).startswith(f"--attention-backend {name}: {reason}; use one of auto, ")
    assert str(error.value).endswith("reference.")
