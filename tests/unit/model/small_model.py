"""Models of a few thousand parameters for tests of one process on the CPU, all weights random, none zero or one."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.core.parallel_state import ParallelState
from megatron.fpdt.observer import Observer
from megatron.model.builder import Execution, build_model
from megatron.model.initialization import Initialization
from tests.reference.reference_model import random_state

VOCAB = 32
PLAIN = Execution()
ON_DEVICE = Execution(fpdt=True, chunk_size=16)
OFFLOADED = Execution(fpdt=True, chunk_size=16, offloading=True)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def small_config(seq_length: int = 40, **changes) -> ModelConfig:
    """A two-layer LLaMA with grouped-query attention and heads wider than hidden/heads."""
    llama = ModelConfig(
        num_layers=2,
        hidden_size=24,
        ffn_hidden_size=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        kv_channels=8,
        seq_length=seq_length,
        use_rotary_position_embeddings=True,
        normalization="rmsnorm",
        swiglu=True,
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
    )
    return replace(llama, **changes).resolved()


def small_gpt_config(seq_length: int = 40, **changes) -> ModelConfig:
    """A two-layer GPT: learned positions, LayerNorm, GELU, biases, tied embeddings."""
    gpt = ModelConfig(num_layers=2, hidden_size=24, ffn_hidden_size=20, num_attention_heads=4, seq_length=seq_length)
    return replace(gpt, **changes).resolved()


def small_model(
    config: ModelConfig,
    execution: Execution = PLAIN,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """Build a model on the CPU with random weights, the same for every execution and dtype."""
    model = build_model(config, VOCAB, ParallelState(), execution, Initialization(dtype))
    model.load_state_dict(random_state(config, VOCAB, seed=3))
    return model


class Reports(Observer):
    """The chunks that layers have worked on: (phase, layer number, chunk)."""

    def __init__(self) -> None:
        self.chunks: list[tuple[str, int, int]] = []

    def begin_chunk(self, phase: str, layer_number: int, chunk: int) -> None:
        self.chunks.append((phase, layer_number, chunk))


def small_inputs(config: ModelConfig, batch_size: int = 2) -> Inputs:
    """Tokens, labels, mask and positions, [B, S] each; a third of the tokens masked."""
    generator = torch.Generator().manual_seed(11)
    shape = (batch_size, config.seq_length)
    tokens, labels = torch.randint(0, VOCAB, (2, *shape), generator=generator)
    mask = (torch.rand(shape, generator=generator) < 0.7).float()
    return tokens, labels, mask, torch.arange(config.seq_length).expand(shape)


def loss_and_gradients(model: nn.Module, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Run one forward and backward pass; return the loss and every parameter's gradient by name."""
    model.zero_grad()
    loss = model(*inputs)
    loss.backward()
    gradients = {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return loss.detach(), gradients


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def assert_same_gradients(got: dict[str, Tensor | None], want: dict[str, Tensor | None], tolerance: float) -> None:
    """Fail with the names of all gradients that are missing or differ by the tolerance or more, in relative norm."""
    assert got.keys() == want.keys()
    wrong = {}
    for name, gradient in want.items():
        value = got[name]
        if gradient is None or value is None:
            assert gradient is value, f"{name}: one has a gradient and the other has none"
            continue
        error = relative_error(value, gradient)
        if not error < tolerance:
            wrong[name] = error
    assert not wrong, wrong
