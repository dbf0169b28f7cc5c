from typing import get_args

import pytest
import torch

from megatron.config.model import AttentionBackendName
from megatron.ops.attention import (
    BACKENDS,
    AttentionUnavailable,
    AttentionVariant,
    choose_backend,
    choose_backend_for_few_queries,
)
from megatron.ops.attention.select import FAMILIES
from tests.unit.ops.attention.test_cpu_backends import request_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_names_are_unique_and_the_reference_is_last():
    names = [backend.name for backend in BACKENDS]
    assert len(set(names)) == len(names)
    assert names[-1] == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("head_size", [8, 80, 256, 13])
def test_auto_on_a_cpu_is_torch_s_kernel(dtype, head_size):
    assert choose_backend("auto", request_for(CPU, dtype, head_size)).name == "torch-cpu"


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
    assert choose_backend("auto", request_for(CUDA, dtype, head_size)).name == expected


@pytest.mark.parametrize(
    "installed, device_capability, head_size, expected",
    [
        (["2.8.3", "3.0.0", "4.0.0"], (9, 0), 128, "flash-attn-4"),
        (["2.8.3", "3.0.0"], (9, 0), 128, "flash-attn-3"),
        (["2.8.3"], (9, 0), 128, "cudnn"),
        (["2.8.3"], (9, 0), 256, "flash-attn-2"),
        (["2.8.3", "3.0.0", "4.0.0"], (8, 0), 128, "flash-attn-2"),
        (["2.8.3", "3.0.0", "4.0.0"], (10, 0), 128, "flash-attn-4"),
        (["2.8.3", "3.0.0", "4.0.0"], (10, 0), 192, "flash-attn-2"),
        (["2.8.3", "3.0.0", "4.0.0"], (7, 5), 128, "reference"),
    ],
)
def test_auto_prefers_the_fastest_package_that_is_installed(
    capability, install, installed, device_capability, head_size, expected
):
    for version in installed:
        install(version)
    capability[0] = device_capability
    assert choose_backend("auto", request_for(CUDA, torch.bfloat16, head_size)).name == expected


@pytest.mark.parametrize(
    "device, dtype, head_size, expected",
    [
        (CUDA, torch.bfloat16, 128, "torch-flash"),
        (CUDA, torch.bfloat16, 100, "reference"),
        (CUDA, torch.float32, 128, "reference"),
        (CPU, torch.float32, 128, "torch-cpu"),
    ],
)
def test_few_queries_go_to_a_kernel_that_splits_the_keys(capability, install, device, dtype, head_size, expected):
    install("4.0.0")
    assert choose_backend_for_few_queries(request_for(device, dtype, head_size)).name == expected


@pytest.mark.parametrize(
    "device, installed, device_capability, head_size, limits, expected",
    [
        (CUDA, ["4.0.0"], (9, 0), 64, {"window": 128}, "flash-attn-4"),
        (CUDA, [], (9, 0), 64, {"window": 128}, "torch-flash"),
        (CUDA, [], (9, 0), 128, {"local_block": 8192}, "torch-flash"),
        (CUDA, ["4.0.0"], (9, 0), 256, {"softcap": 50.0, "window": 4096}, "flash-attn-4"),
        (CUDA, ["2.8.3", "4.0.0"], (10, 0), 256, {"softcap": 50.0}, "flash-attn-2"),
        (CUDA, ["2.8.3", "4.0.0"], (12, 0), 128, {"softcap": 50.0}, "flash-attn-2"),
        (CUDA, ["3.0.0"], (9, 0), 256, {"softcap": 50.0}, "flash-attn-3"),
        (CUDA, ["2.5.9"], (9, 0), 128, {"softcap": 50.0}, "reference"),
        (CPU, [], (0, 0), 192, {"window": 7, "local_block": 8}, "torch-cpu"),
        (CPU, [], (0, 0), 192, {"softcap": 50.0}, "reference"),
    ],
)
def test_auto_serves_all_variants_of_a_model(
    capability, install, device, installed, device_capability, head_size, limits, expected
):
    for version in installed:
        install(version)
    capability[0] = device_capability
    request = request_for(device, torch.bfloat16, head_size)
    request = request._replace(variants=(*request.variants, AttentionVariant(0.1, **limits)))
    assert choose_backend("auto", request).name == expected
    assert choose_backend_for_few_queries(request).refusal(request) is None


@pytest.mark.parametrize("version, name", [(None, "cudnn"), (None, "torch-flash"), ("2.5.9", "flash-attn-2")])
def test_a_softcap_is_refused_by_a_kernel_without_one(capability, install, version, name):
    if version is not None:
        install(version)
    reason = "it has no softcap, and the scores of the model have one; use one of auto, reference."
    with pytest.raises(AttentionUnavailable, match=f"--attention-backend {name}: {reason}"):
        choose_backend(name, request_for(CUDA, torch.bfloat16, 128, softcap=50.0))


def test_the_order_of_auto():
    order = ["flash-attn-4", "flash-attn-3", "cudnn", "flash-attn-2", "torch-flash", "torch-cpu", "reference"]
    assert [backend.name for backend in BACKENDS] == order


def test_every_backend_and_family_has_its_choice_on_the_command_line():
    assert set(get_args(AttentionBackendName)) == {*FAMILIES, *(backend.name for backend in BACKENDS)}


@pytest.mark.parametrize("installed, expected", [(["2.6.3"], "flash-attn-2"), ([], "torch-flash")])
def test_flash_2_is_the_package_where_it_is_installed_and_torch_s_elsewhere(capability, install, installed, expected):
    for version in installed:
        install(version)
    assert choose_backend("flash-2", request_for(CUDA, torch.bfloat16, 128)).name == expected


def test_flash_2_is_refused_with_the_reasons_of_both(capability):
    capability[0] = (7, 5)
    with pytest.raises(AttentionUnavailable) as error:
        choose_backend("flash-2", request_for(CUDA, torch.bfloat16, 128))
    reason = "it needs compute capability 8.0 or later"
    assert str(error.value) == (
        f"--attention-backend flash-2: flash-attn-2: {reason}; torch-flash: {reason}; use one of auto, reference."
    )


@pytest.mark.parametrize(
    "installed, device_capability, expected",
    [
        (["2.8.3", "3.0.0", "4.0.0"], (9, 0), "flash-attn-4"),
        (["2.8.3", "3.0.0", "4.0.0"], (12, 0), "flash-attn-2"),
        (["2.8.3", "3.0.0"], (9, 0), "flash-attn-2"),
        (["3.0.0"], (9, 0), "torch-flash"),
        ([], (7, 5), "reference"),
    ],
)
def test_auto_is_the_fastest_that_is_deterministic(capability, install, installed, device_capability, expected):
    for version in installed:
        install(version)
    capability[0] = device_capability
    assert choose_backend("auto", request_for(CUDA, torch.bfloat16, 128, deterministic=True)).name == expected


@pytest.mark.parametrize(
    "name, device_capability, reason",
    [
        ("cudnn", (9, 0), "through torch it lacks the deterministic backward that --deterministic-mode needs"),
        (
            "flash-attn-3",
            (9, 0),
            "not every build of it has the deterministic backward that --deterministic-mode needs",
        ),
        ("flash-attn-4", (12, 0), "on compute capability 12.x it lacks the deterministic backward that"),
    ],
)
def test_a_backend_that_is_not_deterministic_is_refused(capability, install, name, device_capability, reason):
    for version in ("3.0.0", "4.0.0"):
        install(version)
    capability[0] = device_capability
    with pytest.raises(AttentionUnavailable) as error:
        choose_backend(name, request_for(CUDA, torch.bfloat16, 128, deterministic=True))
    assert str(error.value).startswith(f"--attention-backend {name}: {reason}")
    assert "; use one of auto, " in str(error.value)
    assert f"{name}," not in str(error.value)
    assert choose_backend(name, request_for(CUDA, torch.bfloat16, 128)).name == name


@pytest.mark.parametrize("name", ["torch-cpu", "reference"])
def test_a_name_forces_a_backend(name):
    assert choose_backend(name, request_for(CPU, torch.float32, 64)).name == name


def test_an_unknown_name_is_refused_with_the_names_that_serve():
    with pytest.raises(AttentionUnavailable) as error:
        choose_backend("fastest", request_for(CPU, torch.float32, 64))
    message = "--attention-backend fastest: there is no such backend; use one of auto, torch-cpu, reference."
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["cudnn", "torch-flash", "flash-attn-2", "flash-attn-3", "flash-attn-4"])
def test_a_gpu_kernel_on_a_cpu_is_refused_with_the_reason(name):
    with pytest.raises(AttentionUnavailable, match=f"{name}: it runs on CUDA devices, and the tensors are on cpu; use"):
        choose_backend(name, request_for(CPU, torch.bfloat16, 64))


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
        choose_backend(name, request_for(CUDA, dtype, head_size))
    assert str(error.value).startswith(f"--attention-backend {name}: {reason}; use one of auto, ")
    assert str(error.value).endswith("reference.")


def test_documents_are_not_left_to_a_kernel_that_crashes_on_short_ones(monkeypatch):
    monkeypatch.setattr("megatron.ops.attention.select.BACKENDS", (Always("cudnn"), Always("torch-flash")))
    assert choose_backend("auto", request_for(CPU, torch.bfloat16, 64)).name == "cudnn"
    assert choose_backend("auto", request_for(CPU, torch.bfloat16, 64), short_tiles=True).name == "torch-flash"
    for limits in ({"window": 9}, {"local_block": 9}):
        assert choose_backend("auto", request_for(CPU, torch.bfloat16, 64, **limits)).name == "torch-flash"
    with pytest.raises(AttentionUnavailable, match=r"cudnn: its backward crashes .* use one of auto, torch-flash\."):
        choose_backend("cudnn", request_for(CPU, torch.bfloat16, 64), short_tiles=True)


class Always:
    """A backend that serves everything."""

    def __init__(self, name):
        self.name = name

    def refusal(self, request):
        return None
