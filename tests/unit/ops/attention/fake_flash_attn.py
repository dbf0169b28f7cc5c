"""Stand-ins for the flash-attn packages: each version's signatures and results, computed by the reference.

The tensors are [B, S, H, D] and lse is [B, H, S], as in all of them.
"""

# torch.library.custom_op reads the annotations, so they are not postponed here.
from types import ModuleType

import torch
from torch import Tensor

from megatron.core.documents import Mask
from megatron.ops.attention import QKV, AttentionOutput, KernelVariant
from megatron.ops.attention.reference import ReferenceAttention

UNBOUNDED = -1


def variant_of(scale, causal, window=(UNBOUNDED, UNBOUNDED), softcap=0.0):
    """Query i of a square sees the keys i - left to i + right of a window (left, right), to i if causal."""
    left, right = window[0], 0 if causal else window[1]
    masks = {(UNBOUNDED, UNBOUNDED): Mask.FULL, (UNBOUNDED, 0): Mask.CAUSAL, (0, UNBOUNDED): Mask.UPPER}
    has_window = right == 0 and left != UNBOUNDED
    mask = Mask.CAUSAL if has_window else masks[left, right]
    return KernelVariant(scale, mask, softcap or None, left + 1 if has_window else None)


def attend(q, k, v, variant):
    """(o, lse)"""
    check_layout(q, k, v)
    assert variant.mask is Mask.FULL or q.shape[1] == k.shape[1]
    o, lse = ReferenceAttention().forward(QKV(*(t.transpose(0, 1) for t in (q, k, v))), variant)
    return o.transpose(0, 1).contiguous(), lse.contiguous()


def differentiate(do, q, k, v, o, lse, dq, dk, dv, variant):
    """Write dq, dk and dv."""
    check_layout(do, q, k, v, o, dq, dk, dv)
    assert lse.is_contiguous()
    do, q, k, v, o = (t.transpose(0, 1) for t in (do, q, k, v, o))
    gradients = ReferenceAttention().backward(do, QKV(q, k, v), AttentionOutput(o, lse), variant)
    for target, gradient in zip((dq, dk, dv), gradients, strict=True):
        target.copy_(gradient.transpose(0, 1))


def check_layout(*tensors):
    for t in tensors:
        assert t.dim() == 4
        assert t.stride(-1) == 1


def rest(q):
    """What else a kernel returns: tensors that are neither o nor lse."""
    return torch.full((2,), torch.nan, dtype=q.dtype)


# flash-attn 2.5


def forward_2_5(q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes, return_softmax):
    return forward_2_6(q, k, v, dropout_p, softmax_scale, causal, window_size, 0.0, alibi_slopes, return_softmax)


def backward_2_5(
    dout, q, k, v, out, softmax_lse, dq, dk, dv,
    dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    return backward_2_6(
        dout, q, k, v, out, softmax_lse, dq, dk, dv,
        dropout_p, softmax_scale, causal, window_size, 0.0, alibi_slopes, deterministic, rng_state,
    )  # fmt: skip


# flash-attn 2.6


def forward_2_6(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax):
    assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
    o, lse = attend(q, k, v, variant_of(softmax_scale, causal, window_size, softcap))
    return o, q, k, v, o, lse, None, rest(q)


def backward_2_6(
    dout, q, k, v, out, softmax_lse, dq, dk, dv,
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    assert (dropout_p, alibi_slopes, rng_state) == (0.0, None, None)
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    variant = variant_of(softmax_scale, causal, window_size, softcap)
    differentiate(dout, q, k, v, out, softmax_lse, dq, dk, dv, variant)
    return dq, dk, dv, rest(q)


# flash-attn 2.7 and 2.8: torch operators


@torch.library.custom_op("fake_flash_attn::_flash_attn_forward", mutates_args=())
def forward_2_7(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
    variant = variant_of(softmax_scale, causal, (window_size_left, window_size_right), softcap)
    return *attend(q, k, v, variant), rest(q), rest(q)


@torch.library.custom_op("fake_flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def backward_2_7(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
    deterministic: bool, rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert (dropout_p, alibi_slopes) == (0.0, None)
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    variant = variant_of(softmax_scale, causal, (window_size_left, window_size_right), softcap)
    differentiate(dout, q, k, v, out, softmax_lse, dq, dk, dv, variant)
    return rest(q)


# FlashAttention-3, as first released and with torch operators


def forward_3(
    q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q,
    max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale,
    v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    assert all(t is None for t in (k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, page_table, q_descale, k_descale))
    assert num_splits == 1
    return *attend(q, k, v, variant_of(softmax_scale, causal, window_size, softcap)), None, None


def backward_3(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
    dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    assert all(t is None for t in (cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k))
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    variant = variant_of(softmax_scale, causal, window_size, softcap)
    differentiate(dout, q, k, v, out, softmax_lse, dq, dk, dv, variant)
    return dq, dk, dv, rest(q)


@torch.library.custom_op("fake_flash_attn_3::_flash_attn_forward", mutates_args=())
def forward_3_operator(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None, qv: Tensor | None = None,
    out_: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None, seqused_q: Tensor | None = None, seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None, leftpad_k: Tensor | None = None, rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None, seqlens_rotary: Tensor | None = None, q_descale: Tensor | None = None,
    k_descale: Tensor | None = None, v_descale: Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = False, window_size_left: int = -1, window_size_right: int = -1, attention_chunk: int = 0,
    softcap: float = 0.0, rotary_interleaved: bool = True, scheduler_metadata: Tensor | None = None,
    num_splits: int = 1, pack_gqa: bool | None = None, sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert all(t is None for t in (k_new, v_new, qv, out_, cu_seqlens_q, cu_seqlens_k, page_table, q_descale))
    assert num_splits == 1
    variant = variant_of(softmax_scale, causal, (window_size_left, window_size_right), softcap)
    return *attend(q, k, v, variant), rest(q), rest(q)


@torch.library.custom_op("fake_flash_attn_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def backward_3_operator(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None, sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    softmax_scale: float | None = None, is_causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    variant = variant_of(softmax_scale, is_causal, (window_size_left, window_size_right), softcap)
    differentiate(dout, q, k, v, out, softmax_lse, dq, dk, dv, variant)
    return rest(q)


# flash-attn-4, in which None is unbounded


def variant_of_4(scale, causal, left, right, softcap):
    assert all(side is None or side >= 0 for side in (left, right))
    return variant_of(scale, causal, tuple(UNBOUNDED if side is None else side for side in (left, right)), softcap)


def forward_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
    window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
    intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
    block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None,
    q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
    seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
):  # fmt: skip
    assert all(t is None for t in (qv, cu_seqlens_q, cu_seqlens_k, learnable_sink, score_mod, mask_mod, out))
    variant = variant_of_4(softmax_scale, causal, window_size_left, window_size_right, softcap)
    o, computed_lse = attend(q, k, v, variant)
    return o, computed_lse if return_lse else None, None, None, None


def backward_4(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
    num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
    AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
    learnable_sink=None,
):  # fmt: skip
    assert all(t is None for t in (cu_seqlens_q, cu_seqlens_k, learnable_sink, score_mod, mask_mod, dlse))
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    variant = variant_of_4(softmax_scale, causal, window_size_left, window_size_right, softcap)
    differentiate(dout, q, k, v, out, lse, dq, dk, dv, variant)
    return dq, dk, dv


def module(name, version, **functions):
    fake = ModuleType(name)
    fake.__version__ = version
    for function_name, function in functions.items():
        setattr(fake, function_name, function)
    return fake


def pair(forward, backward):
    return {"_flash_attn_forward": forward, "_flash_attn_backward": backward}


# What is installed: the backend, the module and its functions.
INSTALLED = {
    "2.5.9": ("flash-attn-2", "flash_attn.flash_attn_interface", pair(forward_2_5, backward_2_5)),
    "2.6.3": ("flash-attn-2", "flash_attn.flash_attn_interface", pair(forward_2_6, backward_2_6)),
    "2.7.0": ("flash-attn-2", "flash_attn.flash_attn_interface", pair(forward_2_7, backward_2_7)),
    "2.8.3": ("flash-attn-2", "flash_attn.flash_attn_interface", pair(forward_2_7, backward_2_7)),
    "3.0.0": ("flash-attn-3", "flash_attn_interface", pair(forward_3, backward_3)),
    "3.1.0": ("flash-attn-3", "flash_attn_3.flash_attn_interface", pair(forward_3_operator, backward_3_operator)),
    "4.0.0": (
        "flash-attn-4",
        "flash_attn.cute.interface",
        {"_flash_attn_fwd": forward_4, "_flash_attn_bwd": backward_4},
    ),
}
