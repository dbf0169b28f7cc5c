"""The adapters to every version of the flash-attn packages, against stand-ins that compute with the reference."""

import inspect
import subprocess
import sys

import pytest
import torch

from megatron.core.documents import Mask
from megatron.ops.attention import (
    BACKENDS,
    QKV,
    AttentionOutput,
    AttentionUnavailable,
    AttentionVariant,
    KernelVariant,
    choose_backend,
    cuda_limits,
)
from megatron.ops.attention.flash_attn_packages import FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4, load
from megatron.ops.attention.protocol import NO_SOFTCAP
from tests.unit.ops.attention.fake_flash_attn import INSTALLED, backward_2_5, module, pair
from tests.unit.ops.attention.test_cpu_backends import (
    ALL_MASKS,
    ROWS,
    draw,
    draw_row,
    errors,
    packed,
    request_for,
    row_mask,
    row_of_two_tiles,
    tiled,
    truth,
)

BY_NAME = {backend.name: backend for backend in BACKENDS}
CUDA = torch.device("cuda", 0)
EVERY_VERSION = pytest.mark.parametrize("version", INSTALLED)
SHAPES = {
    "mha": (1, [16, 16], 4, 4, 16),
    "gqa, batch of 3, uneven": (3, [16, 16, 5], 4, 2, 8),
    "mqa, one token at the end": (3, [9, 9, 1], 4, 1, 24),
}


@EVERY_VERSION
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_tiles_add_up_to_attention_over_the_whole(install, version, shape, dtype, tolerance):
    backend = BY_NAME[install(version)]
    tensors = draw(shape, dtype)
    got = tiled(backend, *(t.to(dtype) for t in tensors), 0.3, shape[1])
    assert max(errors(got, truth(*tensors, 0.3))) < tolerance


@EVERY_VERSION
@ALL_MASKS
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_masks_and_softcaps_are_the_definition_in_fp64(install, capability, version, region, softcap):
    backend, shape = BY_NAME[install(version)], ROWS["gqa, head size 192, batch of 2"]
    if refusal := backend.refusal(request_for(CUDA, torch.bfloat16, 192, softcap=softcap)):
        assert (version, refusal) == ("2.5.9", NO_SOFTCAP)
        return
    tensors = draw_row(shape)
    got = row_of_two_tiles(backend, *tensors, AttentionVariant(0.3, softcap), region)
    assert max(errors(got, truth(*tensors, 0.3, softcap, row_mask(region, shape)))) < 1e-13


@EVERY_VERSION
@pytest.mark.parametrize("mask", Mask)
def test_strides_do_not_matter(install, version, mask):
    backend = BY_NAME[install(version)]
    q, k, v, do = draw((3, [21], 4, 2, 8))
    qkv, variant, reference = QKV(q, k, v), KernelVariant(0.3, mask), BY_NAME["reference"]
    o, lse = output = reference.forward(qkv, variant)
    want = [o, lse, *reference.backward(do, qkv, output, variant)]
    views = QKV(*packed(q, k, v))
    transposed_lse = lse.transpose(0, 2).contiguous().transpose(0, 2)
    got = list(backend.forward(views, variant))
    got += backend.backward(packed(do, o, o)[0], views, AttentionOutput(packed(do, o, o)[1], transposed_lse), variant)
    assert max(errors(got, want)) < 1e-14


@EVERY_VERSION
@pytest.mark.usefixtures("deterministic")
def test_the_backward_is_asked_to_be_deterministic_where_torch_has_to_be(install, version):
    backend = BY_NAME[install(version)]
    tiled(backend, *draw(SHAPES["mha"]), 0.3, SHAPES["mha"][1])  # the stand-ins compare what they are asked with torch


@EVERY_VERSION
def test_an_installed_package_serves_and_can_be_forced(install, capability, version):
    name = install(version)
    assert choose_backend(name, request_for(CUDA, torch.bfloat16, 128)).name == name


def test_importing_the_backends_imports_no_package():
    words = "import sys, megatron.ops.attention; print([name for name in sys.modules if name.startswith('flash_attn')])"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_package_is_imported_and_inspected_once(install, monkeypatch):
    backend = BY_NAME[install("2.8.3")]
    q, k, v, _ = draw((1, [4], 2, 2, 8))
    backend.forward(QKV(q, k, v), KernelVariant(0.3, Mask.CAUSAL))
    monkeypatch.setattr(inspect, "signature", None)
    backend.forward(QKV(q, k, v), KernelVariant(0.3, Mask.CAUSAL))


@pytest.mark.parametrize(
    "name, capability_needed, how",
    [
        ("flash-attn-2", (8, 0), 'pip install "flash-attn>=2.5" --no-build-isolation'),
        ("flash-attn-3", (9, 0), "build it from the folder hopper of github.com/Dao-AILab/flash-attention"),
        ("flash-attn-4", (9, 0), 'pip install "flash-attn-4[cu13]>=4.0.0b36"'),
    ],
)
def test_a_package_that_is_not_installed_is_refused_with_the_way_to_install_it(
    capability, name, capability_needed, how
):
    capability[0] = capability_needed
    with pytest.raises(AttentionUnavailable) as error:
        choose_backend(name, request_for(CUDA, torch.bfloat16, 64))
    assert str(error.value).startswith(f"--attention-backend {name}: its package is not installed ({how}); use one of ")


def test_a_tile_of_a_package_that_is_not_installed_says_so():
    q, k, v, _ = draw((1, [4], 2, 2, 8))
    with pytest.raises(AttentionUnavailable, match="--attention-backend flash-attn-4: its package is not installed"):
        BY_NAME["flash-attn-4"].forward(QKV(q, k, v), KernelVariant(0.3, Mask.CAUSAL))


@pytest.mark.parametrize(
    "code, told",
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "ImportError: undefined symbol: _ZN3c10"),
        ("raise OSError('libcudart.so.12: no such file')", "OSError: libcudart.so.12: no such file"),
        ("import flash_attn_2_cuda_absent", "ModuleNotFoundError: No module named 'flash_attn_2_cuda_absent'"),
    ],
)
def test_a_package_that_cannot_be_imported_is_skipped_by_auto_and_told_when_forced(
    capability, folder_of_packages, code, told
):
    (folder_of_packages / "flash_attn").mkdir()
    (folder_of_packages / "flash_attn" / "__init__.py").write_text(code)
    capability[0] = (8, 0)
    assert choose_backend("auto", request_for(CUDA, torch.bfloat16, 128)).name == "torch-flash"
    with pytest.raises(AttentionUnavailable) as error:
        choose_backend("flash-attn-2", request_for(CUDA, torch.bfloat16, 128))
    reason = f"its package is installed and cannot be imported: {told}; use one of auto, torch-flash, reference."
    assert str(error.value) == f"--attention-backend flash-attn-2: {reason}"


def test_flash_attn_4_alone_is_not_taken_for_flash_attn(capability, folder_of_packages):
    (folder_of_packages / "flash_attn" / "cute").mkdir(parents=True)
    (folder_of_packages / "flash_attn" / "cute" / "interface.py").write_text(
        "from tests.unit.ops.attention.fake_flash_attn import forward_4 as _flash_attn_fwd\n"
        "from tests.unit.ops.attention.fake_flash_attn import backward_4 as _flash_attn_bwd\n"
    )
    assert choose_backend("auto", request_for(CUDA, torch.bfloat16, 128)).name == "flash-attn-4"
    assert load(FLASH_ATTN_2).startswith("its package is not installed")
    assert load(FLASH_ATTN_3).startswith("its package is not installed")


@pytest.mark.parametrize(
    "package, name, functions, told",
    [
        # what flash-attn 2.8 has in the place of flash-attn-4
        (
            FLASH_ATTN_4,
            "flash_attn.cute.interface",
            {"_flash_attn_fwd": lambda q, k, v, softmax_scale, causal: None, "_flash_attn_bwd": backward_2_5},
            "<lambda> has no argument return_lse",
        ),
        # a beta, with its results in another order
        (
            FLASH_ATTN_3,
            "flash_attn_interface",
            pair(lambda q, k, v, softmax_scale, causal, window_size=(-1, -1), num_splits=1: None, backward_2_5),
            "<lambda> has no argument page_table",
        ),
        (
            FLASH_ATTN_2,
            "flash_attn.flash_attn_interface",
            pair(lambda q, k, v, softmax_scale, causal, window_size, colour: None, backward_2_5),
            "<lambda> needs colour",
        ),
        (FLASH_ATTN_2, "flash_attn.flash_attn_interface", {}, "has no attribute '_flash_attn_forward'"),
    ],
)
def test_a_version_that_is_not_known_is_refused(monkeypatch, package, name, functions, told):
    monkeypatch.setitem(sys.modules, name, module(name, "9.9", **functions))
    reason = load(package)
    assert reason.startswith("the installed version of its package is not known here: ")
    assert told in reason
    assert package.install in reason


@pytest.mark.parametrize(
    "version, device_capability, dtype, head_size, reason",
    [
        ("2.8.3", (7, 5), torch.bfloat16, 64, "it needs compute capability 8.0 or later"),
        ("2.8.3", (8, 9), torch.bfloat16, 256, "head size 256 is not a multiple of 8 up to 192"),
        ("2.8.3", (9, 0), torch.float32, 64, "it computes in bf16 and fp16, and the tensors are torch.float32"),
        ("2.7.0", (10, 0), torch.bfloat16, 64, "flash-attn before 2.7.4 has no kernels for Blackwell"),
        ("3.0.0", (8, 0), torch.bfloat16, 64, "it needs compute capability 9.0 or later"),
        ("3.0.0", (10, 0), torch.bfloat16, 64, "it needs compute capability 9.x or earlier, and this device has 10.x"),
        ("3.0.0", (9, 0), torch.float16, 264, "head size 264 is not a multiple of 8 up to 256"),
        ("4.0.0", (8, 0), torch.bfloat16, 64, "it needs compute capability 9.0 or later"),
        ("4.0.0", (13, 0), torch.bfloat16, 64, "it needs compute capability 12.x or earlier, and this device has 13.x"),
        ("4.0.0", (9, 0), torch.bfloat16, 100, "head size 100 is not a multiple of 32 up to 256"),
        ("4.0.0", (9, 0), torch.bfloat16, 80, "head size 80 is not a multiple of 32 up to 256"),
        ("4.0.0", (10, 0), torch.bfloat16, 192, "head size 192 is not a multiple of 32 up to 128"),
        ("4.0.0", (12, 0), torch.bfloat16, 256, "head size 256 is not a multiple of 32 up to 128"),
    ],
)
def test_a_refusal_says_why(install, capability, version, device_capability, dtype, head_size, reason):
    name = install(version)
    capability[0] = device_capability
    with pytest.raises(AttentionUnavailable) as error:
        choose_backend(name, request_for(CUDA, dtype, head_size))
    assert str(error.value).startswith(f"--attention-backend {name}: {reason}")


@pytest.mark.parametrize(
    "version, device_capability, head_size",
    [
        ("2.5.9", (8, 0), 256),
        ("2.8.3", (10, 0), 256),
        ("3.1.0", (9, 0), 256),
        ("4.0.0", (9, 0), 256),
        ("4.0.0", (10, 0), 256),
        ("4.0.0", (12, 0), 128),
    ],
)
def test_the_largest_heads_that_are_served(install, capability, version, device_capability, head_size):
    name = install(version)
    capability[0] = device_capability
    assert choose_backend(name, request_for(CUDA, torch.bfloat16, head_size)).name == name


@pytest.mark.parametrize("name", ["flash-attn-2", "torch-flash", "cudnn"])
def test_more_elements_than_a_kernel_counts_are_refused(install, name):
    install("2.8.3")
    q = torch.empty(1, dtype=torch.bfloat16).expand(2**18, 1, 64, 128)
    message = f"{name}: 262144 tokens x 1 sequences x 64 heads of 128 are 2147483648 elements"
    with pytest.raises(AttentionUnavailable, match=message):
        BY_NAME[name].forward(QKV(q, q, q), KernelVariant(0.3, Mask.CAUSAL))


@pytest.mark.parametrize(
    "shape, fits",
    [
        ((2**18 - 128, 1, 64, 128), True),
        ((2**18 - 127, 1, 64, 128), False),
        ((2**18, 1, 64, 96), True),
        ((2**18, 1, 64, 104), False),
        ((2**17, 4, 64, 128), False),
        ((2**17, 3, 32, 128), True),
        ((2**17, 1, 64, 200), False),
    ],
)
def test_what_is_counted_is_padded_to_blocks(shape, fits):
    q = torch.empty(1).expand(shape)
    if fits:
        cuda_limits.refuse_more_than_31_bits_count("torch-flash", q)
    else:
        with pytest.raises(AttentionUnavailable):
            cuda_limits.refuse_more_than_31_bits_count("torch-flash", q)
