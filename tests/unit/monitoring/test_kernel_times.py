import threading
from types import SimpleNamespace

import pytest
import torch

from megatron.monitoring.kernel_times import (
    Copies,
    Kernel,
    exclusive_seconds,
    hidden_copies,
    ranges_of,
    seconds_by_kind,
    seconds_by_name,
)

SECOND = 10**9


@pytest.mark.parametrize(
    "name, kind",
    [
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("Memset (Device)", "copies"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at", "attention forward"),
        ("kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object", "attention backward"),
        ("kernel_cutlass_kernel_flash_attncuteflash_bwd_preprocessFlashAttentionBackwardPre", "attention backward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention forward"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention backward"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*", "attention backward"),
        ("void cudnn::fusion::fmha_reduce_head<true>(void const*, void*", "attention backward"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128", "attention forward"),
        ("void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits", "attention backward"),
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("triton_poi_fused_mul_silu_split_0", "other"),
    ],
)
def test_kernels_are_known_by_their_names(name, kind):
    assert Kernel(name, 0, 1).kind == kind


def test_waiting_is_when_nothing_computes_whatever_is_copied():
    kernels = [
        Kernel("nvjet_b", 5 * SECOND, SECOND),  # unsorted, and within the one before it
        Kernel("nvjet_a", 3 * SECOND, 4 * SECOND),
        Kernel("triton_c", SECOND, SECOND),
        Kernel("Memcpy DtoH", 0, 20 * SECOND),
    ]
    assert seconds_by_kind(kernels) == {"copies": 20, "other": 1, "matrix products": 5, "waiting": 1}


def test_the_longest_kernels_come_first():
    kernels = [Kernel("a", 0, SECOND), Kernel("b", 0, 3 * SECOND), Kernel("a", 0, SECOND), Kernel("c", 0, SECOND)]
    assert seconds_by_name(kernels, most=2) == [(3, 1, "b"), (2, 2, "a")]


def test_a_copy_is_hidden_while_it_overlaps_with_compute():
    kernels = [
        Kernel("gemm_a", 2 * SECOND, 2 * SECOND),
        Kernel("gemm_b", 3 * SECOND, 2 * SECOND),  # overlaps the one before: the time counts once
        Kernel("gemm_within_b", 3 * SECOND, SECOND),
        Kernel("triton_c", 8 * SECOND, SECOND),
        Kernel("ncclDevKernel_SendRecv", 5 * SECOND, 3 * SECOND),  # waits for the same links
        Kernel("Memcpy DtoH (Device -> Pinned)", 0, 10 * SECOND),
        Kernel("Memcpy HtoD (Pinned -> Device)", 4 * SECOND, SECOND),
        Kernel("Memcpy DtoD (Device -> Device)", 9 * SECOND, SECOND),  # does not cross the link
    ]
    assert hidden_copies(kernels) == Copies(11, 5)


def test_ranges_count_without_those_within_them():
    ranges = [Kernel("a", 0, 10 * SECOND), Kernel("b", SECOND, 4 * SECOND), Kernel("a", 2 * SECOND, SECOND)]
    ranges += [Kernel("b", 20 * SECOND, SECOND)]
    assert exclusive_seconds(ranges) == {"a": 7, "b": 4}


@pytest.mark.parametrize(
    "spans, expected",
    [
        ({"a": (0, 1), "b": (0.5, 9.5)}, {"a": 0.5, "b": 9.5}),  # as of two threads
        ({"a": (0, 10), "b": (1, 5), "c": (4, 5)}, {"a": 2, "b": 3, "c": 5}),
        ({"a": (0, 2), "b": (0, 2), "c": (1, 4)}, {"a": 0, "b": 1, "c": 4}),
        ({"a": (0, 9), "b": (1, 6), "c": (2, 1), "d": (8, 4)}, {"a": 2, "b": 5, "c": 1, "d": 4}),
    ],
)
def test_of_ranges_that_overlap_each_instant_counts_for_the_last_to_begin(spans, expected):
    ranges = [Kernel(name, int(start * SECOND), int(length * SECOND)) for name, (start, length) in spans.items()]
    assert exclusive_seconds(ranges) == expected


def test_ranges_of_other_threads_are_left_out() -> None:
    def event(name: str, thread: int) -> SimpleNamespace:
        answers = {
            "name": name, "start_ns": 5, "duration_ns": 2, "device_type": torch.autograd.DeviceType.CPU,
            "is_user_annotation": True, "device_resource_id": thread,
        }  # fmt: skip
        return SimpleNamespace(**{key: lambda value=value: value for key, value in answers.items()})

    events = [event("all-to-all", threading.get_native_id()), event("gloo:all_to_all", threading.get_native_id() + 1)]
    results = SimpleNamespace(events=lambda: events)
    profile = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    assert ranges_of(profile) == [Kernel("all-to-all", 5, 2)]
