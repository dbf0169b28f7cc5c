"""Settings of low-rank adapters on a frozen Hugging Face model."""

from dataclasses import dataclass
from typing import Literal

QuantizedFormat = Literal["nf4"]


@dataclass(frozen=True, kw_only=True)
class AdaptersConfig:
    """Adapters (LoRA, DoRA and QLoRA) of --hf-model, through peft. Its weights are frozen then."""

    lora_rank: int | None = None
    """Train low-rank adapters of this rank in place of the weights of --hf-model."""

    lora_alpha: float | None = None
    """Scale of the adapters: their output is multiplied by alpha / rank. Default: twice the rank."""

    lora_dropout: float = 0.0
    """Dropout of the adapters' inputs."""

    lora_target_modules: tuple[str, ...] = ()
    """What to adapt: the ends of the names of linear layers, or of weights in stacks of experts such as
    experts.gate_up_proj. Default: all-linear, every linear layer but the output layer."""

    use_dora: bool = False
    """Train a magnitude for each output of an adapted layer too (DoRA)."""

    quantize_base: QuantizedFormat | None = None
    """Store the frozen weights of the blocks in 4 bits (QLoRA), by bitsandbytes. Products are computed in the number
    format of the run. Embedding and output layer stay as they are."""

    load_adapter: str | None = None
    """Folder of an adapter that peft saved, to start from. It says rank, scale and targets, too."""

    merge_adapter: bool = False
    """Let --save-hf write the whole model, with the adapters added to its weights, in place of the adapters alone."""

    @property
    def is_used(self) -> bool:
        """Whether adapters are trained."""
        return self.lora_rank is not None or self.load_adapter is not None

    @property
    def alpha(self) -> float:
        """The scale, given or by default."""
        return 2.0 * (self.lora_rank or 0) if self.lora_alpha is None else self.lora_alpha
