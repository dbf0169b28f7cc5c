"""FlashAttention backends from the flash-attn packages, with the argument names of each version mapped to ours.

    package              module                       forward returns                       window of the mask
    flash-attn 2.5, 2.6  flash_attn                   o, q, k, v, padded o, lse, ...        window_size
    flash-attn 2.7, 2.8  flash_attn                   o, lse, ...                           window_size_left, _right
    FlashAttention-3     flash_attn_interface         o, lse, ...                           either of the two
    flash-attn-4         flash_attn.cute              o, lse, ...                           not needed

All take [B, S, H, D] with grouped key/value heads, return lse [B, H, S] in natural logarithm, and write the gradients
into the dq, dk and dv that are passed to their backward. Differences are read from the signatures once, when a package
is first used; nothing is imported before.
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

from megatron.ops.attention.cuda_limits import cuda_refusal, refuse_more_than_31_bits_count
from megatron.ops.attention.protocol import AttentionUnavailable

# Other names of our arguments.
_SPELLINGS = {"causal": ("causal", "is_causal"), "lse": ("softmax_lse", "lse")}

# Arguments that some versions require, and the value that disables each.
_UNUSED: dict[str, Any] = {
    "dropout_p": 0.0,
    "window_size": (-1, -1),
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
    "return_softmax": False,
    "deterministic": False,
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
        shared, both = ("q", "k", "v", "softmax_scale", "causal"), package.both_options
        return Kernels(
            _callable_by_our_names(forward, (*shared, *package.forward_options, *both)),
            _callable_by_our_names(backward, (*shared, "dout", "out", "lse", "dq", "dk", "dv", *both)),
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
    required -= set(theirs.values())
    if unknown := sorted(required - _UNUSED.keys()):
        raise TypeError(f"{_name(function)} needs {', '.join(unknown)}")
    unused = {name: _UNUSED[name] for name in required}

    def call(**arguments: Any) -> Any:
        return function(**{theirs[name]: value for name, value in arguments.items()}, **unused)

    return call


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_plain(function)).parameters


def _name(function: Callable[..., Any]) -> str:
    return getattr(_plain(function), "__name__", repr(function))


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function behind a torch custom operator, whose own signature is (*args, **kwargs)."""
    return getattr(function, "_init_fn", function)


class PackagedAttention(ABC):
    """The protocol on top of a package; a subclass says on which devices its kernels run."""

    name: str
    package: ClassVar[Package]

    def refusal(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        reason = self.limits(device, dtype, head_size)
        if reason is not None:
            return reason
        kernels = load(self.package)
        return kernels if isinstance(kernels, str) else None

    @abstractmethod
    def limits(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        """Return why the kernels, if installed, could not serve such tensors, or None if they could."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))  # [S, B, H, D] -> [B, S, H, D]
        kernels, options = self._kernels(), self.package.forward_options
        results = kernels.forward(q=q, k=k, v=v, softmax_scale=scale, causal=causal, **options)
        return results[0].transpose(0, 1), results[kernels.lse_position]

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        do, q, k, v, o = (t.transpose(0, 1) for t in (do, q, k, v, o))  # [S, B, H, D] -> [B, S, H, D]
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        self._kernels().backward(
            dout=do, q=q, k=k, v=v, out=o, lse=lse.contiguous(), dq=dq, dk=dk, dv=dv, softmax_scale=scale, causal=causal
        )
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

    def limits(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        # 2.5 has no backward for larger heads on the smaller Ampere chips and on Ada.
        small = device.type == "cuda" and (8, 0) < torch.cuda.get_device_capability(device) < (9, 0)
        return cuda_refusal(device, dtype, head_size, minimum_capability=(8, 0), largest_head=192 if small else 256)

    def refusal(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        reason = super().refusal(device, dtype, head_size)
        if reason is None and torch.cuda.get_device_capability(device) >= (10, 0) and _flash_attn_version() < (2, 7, 4):
            return 'flash-attn before 2.7.4 has no kernels for Blackwell (pip install "flash-attn>=2.7.4")'
        return reason

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        refuse_more_than_31_bits_count(self.name, q)
        return super().forward(q, k, v, causal, scale)


class FlashAttention3(PackagedAttention):
    """FlashAttention-3: Hopper only."""

    name = "flash-attn-3"
    package = FLASH_ATTN_3

    def limits(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        return cuda_refusal(device, dtype, head_size, minimum_capability=(9, 0), largest_head=256, newest_major=9)


class FlashAttention4(PackagedAttention):
    """flash-attn-4, which compiles its kernels on first use: Hopper and Blackwell."""

    name = "flash-attn-4"
    package = FLASH_ATTN_4

    def limits(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
        # Data-center Blackwell has kernels for head size 256, but none between 128 and 256.
        reaches_256 = major == 9 or (major in (10, 11) and head_size == 256)
        return cuda_refusal(
            device,
            dtype,
            head_size,
            minimum_capability=(9, 0),
            largest_head=256 if reaches_256 else 128,
            newest_major=12,
            head_multiple=32,  # 80 failed against fp64 on an H200 (4.0.0b36); 64, 96 and 128 did not
        )

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        kernels, options = self._kernels(), {**self.package.forward_options, **_packing(boundaries, longest)}
        results = kernels.forward(q=q, k=k, v=v, softmax_scale=scale, causal=True, **options)
        return results[0], results[kernels.lse_position]

    def backward_packed(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        boundaries: Tensor,
        longest: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        do, q, k, v, o = (t.contiguous() for t in (do, q, k, v, o))  # large strides are reported to give silent errors
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        self._kernels().backward(
            dout=do, q=q, k=k, v=v, out=o, lse=lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale, causal=True,
            **_packing(boundaries, longest),
        )  # fmt: skip
        return dq, dk, dv


def _packing(boundaries: Tensor, longest: int) -> dict[str, Any]:
    return {"cu_seqlens_q": boundaries, "cu_seqlens_k": boundaries, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _flash_attn_version() -> tuple[int, ...]:
    version = getattr(importlib.import_module("flash_attn"), "__version__", "0")
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
