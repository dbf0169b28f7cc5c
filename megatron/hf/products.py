"""Linear layers of transformers' models on the tape of a streamed layer (megatron.ops.linear)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from megatron.ops.linear import linear


class TapedLinear(nn.Linear):
    """A linear layer whose product can be recorded, replayed and skipped."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class TapedConv1D(Conv1D):
    """The same with the weight stored transposed, as in GPT-2."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, transposed=True)


TAPED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: TapedLinear, Conv1D: TapedConv1D}


def put_on_tape(part: nn.Module) -> None:
    """Let the linear layers of a part of the model run on the tape.

    A subclass of them may compute something else, so it is left alone. So are experts: how many of them run depends on
    the tokens, and the products of a tape are numbered by the order in which they run.
    """
    for name, module in part.named_modules():
        if type(module) in TAPED and "experts" not in name.split("."):
            module.__class__ = TAPED[type(module)]
        elif type(module).__name__ == "DoraLinearLayer":
            from megatron.hf.dora import StreamedDora  # imports peft, which other models do not need

            module.__class__ = StreamedDora
