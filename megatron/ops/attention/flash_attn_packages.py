"""FlashAttention backends from the flash-attn packages, with the argument names of each version mapped to ours.

    package              module                       forward returns                       window, left and right
    flash-attn 2.5, 2.6  flash_attn                   o, q, k, v, padded o, lse, ...        window_size
    flash-attn 2.7, 2.8  flash_attn                   o, lse, ...                           window_size_left, _right
    FlashAttention-3     flash_attn_interface         o, lse, ...                           either of the two
    flash-attn-4         flash_attn.cute              o, lse, ...                           window_size_left, _right

All take [B, S, H, D] with grouped key/value heads, return lse [B, H, S] in natural logarithm, and write the gradients
into the dq, dk and dv that are passed to their backward. All but flash-attn 2.5 take a softcap. Only the left side of a
window is passed to them: the right side is unbounded, or 0 where `causal`. Differences are read from the signatures
once, when a package is first used; nothing is imported before.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron.ops.attention.cuda_limits import CudaLimits, capability, refuse_more_than_31_bits_count
from megatron.ops.attention.protocol import (
    NO_SOFTCAP,
    QKV,
    AttentionOutput,
    AttentionRequest,
    AttentionUnavailable,
    KernelVariant,
    PackedSequences,
)

# Other names of our arguments. `window_size` is a pair.
_SPELLINGS = {
    "causal": ("causal", "is_causal"),
    "lse": ("softmax_lse", "lse"),
    "window_size_left": ("window_size_left", "window_size"),
}

# Arguments that some versions require, and the value that disables each.
_UNUSED: dict[str, Any] = {
    "dropout_p": 0.0,
    "window_size": (-1, -1),
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
    "return_softmax": False,
    **dict.fromkeys(("k_new", "v_new", "qv", "out", "kv_batch_idx", "leftpad_k")),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "max_seqlen_q", "max_seqlen_k")),
    **dict.fromkeys(("seqused_q", "seqused_k", "sequed_q", "sequed_k", "seqlens_rotary")),
    **dict.fromkeys(("rotary_cos", "rotary_sin", "q_descale", "k_descale", "v_descale")),
}


@dataclass(frozen=True, eq=False)
class Package:
    """The modules and names under which a pair of kernels is found.

    `forward_options` are arguments of the forward that every supported version has. `both_options` are names of such
    arguments of forward and backward.
    """

    install: str
    modules: tuple[str, ...]
    forward: str = "_flash_attn_forward"
    backward: str = "_flash_attn_backward"
    forward_options: Mapping[str, Any] = field(default_factory=dict)
    both_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kernels:
    """A package's two functions, callable by our argument names, and the position of lse among the results."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    lse_position: int
    softcap: bool


FLASH_ATTN_2 = Package('pip install "flash-attn>=2.5" --no-build-isolation', ("flash_attn.flash_attn_interface",))
FLASH_ATTN_3 = Package(
    "build it from the folder hopper of github.com/Dao-AILab/flash-attention",
    ("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
    # The betas, which return lse at another position, do not have this argument.
    forward_options={"page_table": None},
)
FLASH_ATTN_4 = Package(
    'pip install "flash-attn-4[cu13]>=4.0.0b36"',
    ("flash_attn.cute.interface",),
    "_flash_attn_fwd",
    "_flash_attn_bwd",
    forward_options={"return_lse": True},
    both_options=("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
)


@functools.cache
def load(package: Package) -> Kernels | str:
    """Return the kernels of a package, or the reason why there are none."""
    module = _import_first_of(package)
    if isinstance(module, str):
        return module
    try:
        forward, backward = getattr(module, package.forward), getattr(module, package.backward)
        softcap = all("softcap" in _parameters(function) for function in (forward, backward))
        both = ("q", "k", "v", "softmax_scale", "causal", *package.both_options, "window_size_left")
        both = (*both, "softcap") if softcap else both
        return Kernels(
            _callable_by_our_names(forward, (*package.forward_options, *both)),
            _callable_by_our_names(backward, ("dout", "out", "lse", "dq", "dk", "dv", "deterministic", *both)),
            softcap=softcap,
            lse_position=5 if {"window_size", "return_softmax"} <= _parameters(forward).keys() else 1,
        )
    except (AttributeError, TypeError) as error:
        return f"the installed version of its package is not known here: {error} ({package.install})"


def _import_first_of(package: Package) -> ModuleType | str:
    for name in package.modules:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                return _broken(error)
        except Exception as error:  # a build that does not match torch raises all kinds of errors
            return _broken(error)
    return f"its package is not installed ({package.install})"


def _broken(error: Exception) -> str:
    return f"its package is installed and cannot be imported: {type(error).__name__}: {error}"


def _callable_by_our_names(function: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """Wrap `function` to take our argument names. TypeError if it lacks one or requires one that is unknown here."""
    parameters = _parameters(function)
    theirs = {}
    for name in names:
        spellings = [spelling for spelling in _SPELLINGS.get(name, (name,)) if spelling in parameters]
        if not spellings:
            raise TypeError(f"{_name(function)} has no argument {name}")
        theirs[name] = spellings[0]
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    if unknown := sorted(required - set(theirs.values()) - _UNUSED.keys()):
        raise TypeError(f"{_name(function)} needs {', '.join(unknown)}")
    unused = {name: _UNUSED[name] for name in required & _UNUSED.keys()}

    def call(**arguments: Any) -> Any:
        given = {theirs[name]: value for name, value in arguments.items()}
        if "window_size" in given:
            given["window_size"] = (given["window_size"], -1)
        return function(**(unused | given))

    return call


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_plain(function)).parameters


def _name(function: Callable[..., Any]) -> str:
    return getattr(_plain(function), "__name__", repr(function))


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function behind a torch custom operator, whose own signature is (*args, **kwargs)."""
    return getattr(function, "_init_fn", function)


class PackagedAttention(ABC):
    """The protocol on top of a package; a subclass has the limits of its kernels."""

    name: str
    has_windows = True
    package: ClassVar[Package]

    def refusal(self, request: AttentionRequest) -> str | None:
        reason = self.limits(request).refusal(request)
        if reason is not None:
            return reason
        kernels = load(self.package)
        if isinstance(kernels, str):
            return kernels
        return NO_SOFTCAP if request.has_softcap and not kernels.softcap else None

    @abstractmethod
    def limits(self, request: AttentionRequest) -> CudaLimits:
        """Return the limits of the kernels on the device of the request."""

    def forward(self, qkv: QKV, variant: KernelVariant) -> AttentionOutput:
        q, k, v = (t.transpose(0, 1) for t in qkv)  # [S, B, H, D] -> [B, S, H, D]
        kernels, options = self._kernels(), {**self.package.forward_options, **_variant_options(variant)}
        results = kernels.forward(q=q, k=k, v=v, **options)
        return AttentionOutput(results[0].transpose(0, 1), results[kernels.lse_position])

    def backward(
        self, do: Tensor, qkv: QKV, output: AttentionOutput, variant: KernelVariant
    ) -> tuple[Tensor, Tensor, Tensor]:
        do, q, k, v, o = (t.transpose(0, 1) for t in (do, *qkv, output.o))  # [S, B, H, D] -> [B, S, H, D]
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        self._kernels().backward(
            dout=do, q=q, k=k, v=v, out=o, lse=output.lse.contiguous(), dq=dq, dk=dk, dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(), **_variant_options(variant),
        )  # fmt: skip
        return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)

    def _kernels(self) -> Kernels:
        kernels = load(self.package)
        if isinstance(kernels, str):
            raise AttentionUnavailable(f"--attention-backend {self.name}: {kernels}.")
        return kernels


class FlashAttention2(PackagedAttention):
    """The flash-attn package: Ampere and later."""

    name = "flash-attn-2"
    package = FLASH_ATTN_2

    def limits(self, request: AttentionRequest) -> CudaLimits:
        # 2.5 has no backward for larger heads on the smaller Ampere chips and on Ada.
        small = (8, 0) < capability(request.device) < (9, 0)
        return CudaLimits(minimum_capability=(8, 0), largest_head=192 if small else 256, softcap=True)

    def refusal(self, request: AttentionRequest) -> str | None:
        reason = super().refusal(request)
        if reason is None and capability(request.device) >= (10, 0) and _flash_attn_version() < (2, 7, 4):
            return 'flash-attn before 2.7.4 has no kernels for Blackwell (pip install "flash-attn>=2.7.4")'
        return reason

    def forward(self, qkv: QKV, variant: KernelVariant) -> AttentionOutput:
        refuse_more_than_31_bits_count(self.name, qkv.q)
        return super().forward(qkv, variant)


class FlashAttention3(PackagedAttention):
    """FlashAttention-3: Hopper only."""

    name = "flash-attn-3"
    package = FLASH_ATTN_3

    def limits(self, request: AttentionRequest) -> CudaLimits:
        return CudaLimits(minimum_capability=(9, 0), largest_head=256, newest_major=9, softcap=True)

    def refusal(self, request: AttentionRequest) -> str | None:
        reason = super().refusal(request)
        if reason is None and request.deterministic:
            return "not every build of it has the deterministic backward that --deterministic-mode needs"
        return reason


class FlashAttention4(PackagedAttention):
    """flash-attn-4, which compiles its kernels on first use: Hopper and Blackwell."""

    name = "flash-attn-4"
    package = FLASH_ATTN_4

    def limits(self, request: AttentionRequest) -> CudaLimits:
        major, _ = capability(request.device)
        # Data-center Blackwell has kernels for head size 256, but none between 128 and 256.
        reaches_256 = major == 9 or (major in (10, 11) and request.head_size == 256)
        return CudaLimits(
            minimum_capability=(9, 0),
            largest_head=256 if reaches_256 else 128,
            newest_major=12,
            softcap=major == 9 or (major in (10, 11) and request.head_size != 256),
            head_multiple=32,  # 80 failed against fp64 on an H200 (4.0.0b36); 64, 96 and 128 did not
        )

    def refusal(self, request: AttentionRequest) -> str | None:
        reason = super().refusal(request)
        if reason is None and request.deterministic and capability(request.device) >= (12, 0):
            return "on compute capability 12.x it lacks the deterministic backward that --deterministic-mode needs"
        return reason

    def forward_packed(self, qkv: QKV, packed: PackedSequences, variant: KernelVariant) -> AttentionOutput:
        kernels, options = self._kernels(), {**self.package.forward_options, **_variant_options(variant)}
        results = kernels.forward(q=qkv.q, k=qkv.k, v=qkv.v, **options, **_packing_options(packed))
        return AttentionOutput(results[0], results[kernels.lse_position])

    def backward_packed(
        self, do: Tensor, qkv: QKV, output: AttentionOutput, packed: PackedSequences, variant: KernelVariant
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Large strides are reported to give silent errors.
        do, q, k, v, o = (t.contiguous() for t in (do, *qkv, output.o))
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        self._kernels().backward(
            dout=do, q=q, k=k, v=v, out=o, lse=output.lse, dq=dq, dk=dk, dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(), **_variant_options(variant),
            **_packing_options(packed),
        )  # fmt: skip
        return dq, dk, dv


def _variant_options(variant: KernelVariant) -> dict[str, Any]:
    options: dict[str, Any] = {"softmax_scale": variant.scale, "causal": variant.is_causal}
    if variant.keys_before is not None:
        options["window_size_left"] = variant.keys_before
    if variant.softcap is not None:
        options["softcap"] = variant.softcap
    return options


def _packing_options(packed: PackedSequences) -> dict[str, Any]:
    starts, longest = packed
    return {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _flash_attn_version() -> tuple[int, ...]:
    version = getattr(importlib.import_module("flash_attn"), "__version__", "0")
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
