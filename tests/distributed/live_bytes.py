"""Count the bytes of live tensors that an operation has touched, on the device that plays the accelerator.

On CPU the "device" and the "host tier" are both plain memory, so nothing but ownership tells them apart: every storage
that any operation reads or writes counts as device memory, from the moment an operation sees it until it is freed,
unless it was named beforehand (parameters, gradients, inputs) or belongs to the host tier.
"""

import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytesMeter(TorchDispatchMode):
    """Within this context, `current_bytes` and `peak_bytes` follow what lives outside `known` and the host tier.

    Works through the backward pass on CPU, where autograd runs in the calling thread. A gloo thread lets go of a
    finished collective's buffers a moment after `wait` has returned: with `settle_seconds`, a new peak counts only if
    it is still there after that pause.
    """

    def __init__(
        self,
        known: Iterable[Tensor] = (),
        in_host_tier: Callable[[Tensor], bool] = lambda _: False,
        settle_seconds: float = 0.0,
    ) -> None:
        super().__init__()
        self._settle_seconds = settle_seconds
        self._known = list(known)  # kept alive, so that no new storage takes an address of theirs
        self._known_storages = {_key(tensor) for tensor in self._known}
        self._in_host_tier = in_host_tier
        self._live: dict[int, int] = {}
        self.current_bytes = 0
        self.peak_bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_flatten((args, kwargs, result))[0]:
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if self.current_bytes > self.peak_bytes and self._settle_seconds:
            time.sleep(self._settle_seconds)
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        return result

    def _see(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._known_storages or key in self._live or self._in_host_tier(tensor):
            return
        storage = tensor.untyped_storage()
        self._live[key] = storage.nbytes()
        self.current_bytes += storage.nbytes()
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.current_bytes -= self._live.pop(key)


class OperationNames(TorchDispatchMode):
    """Within this context, `names` gathers the operations that read or write a tensor of the host tier."""

    def __init__(self, in_host_tier: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self._in_host_tier = in_host_tier
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = tree_flatten((args, kwargs))[0]
        if any(isinstance(leaf, Tensor) and self._in_host_tier(leaf) for leaf in leaves):
            self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
