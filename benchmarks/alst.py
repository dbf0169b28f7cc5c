"""DeepSpeed's ALST on a Hugging Face LLaMA, set up as its documentation says, for `benchmarks/peers.py`.

ALST (Arctic Long Sequence Training, arXiv 2506.13996) is Ulysses sequence parallelism for Hugging Face models, tiled
MLP and loss, and activation checkpoints in host memory. Every part is DeepSpeed's own code, and the settings come from
DeepSpeed's tutorial "Arctic Long Sequence Training (ALST) for HF Transformers integration" and from the run
configurations for Llama-3.1-8B in ArcticTraining (projects/sequence-parallelism):

| part | setting | source |
|---|---|---|
| attention | `UlyssesSPAttentionHF.register_with_transformers`, `UlyssesSPDataLoaderAdapter` | tutorial, part 1 |
| MLP | `TiledMLP` with ceil(tokens of a rank / hidden size) tiles | tutorial, part 2 |
| loss | `TiledFusedLogitsLoss` in tiles of 1 GiB of fp32 logits | ArcticTraining's trainer without Liger |
| checkpoints | every layer, not reentrant, input to pinned memory on a side stream | tutorial, part 2 |
| ZeRO | stage 3, reduction in bf16 | ArcticTraining's configurations |
| allocator | `expandable_segments:True` | tutorial, part 2 |
| torch.compile | off | tutorial and ArcticTraining |

Where a choice remains, the faster one is taken. The number of tiles is computed, without the all-reduce of the
tutorial; ranks have equally many tokens. Each rank differentiates the mean loss of its own tokens, which has the
gradient of the tutorial's all-gather without its communication. The optimizer stays on the GPU, and optimizer,
gradient clipping and ZeRO-3's buckets are those of our own runs. Liger's fused loss is not used, as it would be the
only kernel that the cases do not share.

Two errors are avoided. `TiledFusedLogitsLoss` computes the gradient of the head's weight in its forward pass, so a
factor that is applied to its result never reaches that weight: here the factor is inside. DeepSpeed casts the
frequencies of the rotary embedding to bf16: here they are restored to fp32.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.activation_checkpointing.offload_activations import (
    get_checkpoint_hidden_states_offloading_ctx_manager,
)
from deepspeed.runtime.sequence_parallel.ulysses_sp import (
    TiledFusedLogitsLoss,
    TiledMLP,
    UlyssesSPAttentionHF,
    UlyssesSPDataLoaderAdapter,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from benchmarks.common import (
    GIB,
    Row,
    free_memory,
    gib,
    peak_bytes,
    peak_process_bytes,
    reserved_bytes,
    reset_peak,
    spread,
    wall_seconds,
)
from megatron.config import Config, ModelConfig, deepspeed_config
from megatron.core.documents import Mask
from megatron.core.parallel_state import ParallelState
from megatron.engine.adam import build_adam
from megatron.initialize import Context, initialize
from megatron.model.builder import Execution, build_model
from megatron.model.initialization import Initialization
from megatron.model.layers import attention_request
from megatron.ops.attention import QKV, AttentionBackend, AttentionOutput, KernelVariant, choose_backend
from megatron.optimizer.param_groups import parameter_groups
from megatron.planner.flops import model_flops
from megatron.tokenizer import pad_vocab_size
from megatron.weights.families.llama import LLAMA

LOSS_TILE_BYTES = GIB  # of fp32 logits
SAME_KERNEL = "same-kernel"  # the attention backend of our own runs
WARM_UP_TOKENS = 1024  # per rank, of a short warm-up


class KernelAttention(torch.autograd.Function):
    """Causal attention by one of our backends on [B, H, S, D], as Hugging Face models call it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend, scale: float) -> Tensor:
        qkv, ctx.variant = QKV(*(_sequence_first(t) for t in (q, k, v))), KernelVariant(scale, Mask.CAUSAL)
        o, lse = backend.forward(qkv, ctx.variant)
        ctx.save_for_backward(*qkv, o, lse)
        ctx.backend = backend
        return o.transpose(0, 1)  # [S, B, H, D] -> [B, S, H, D]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        do = grads[0].transpose(0, 1)  # [B, S, H, D] -> [S, B, H, D]
        *qkv, o, lse = ctx.saved_tensors
        gradients = ctx.backend.backward(do, QKV(*qkv), AttentionOutput(o, lse), ctx.variant)
        return *(t.permute(1, 2, 0, 3) for t in gradients), None, None  # [S, B, H, D] -> [B, H, S, D]


def _sequence_first(t: Tensor) -> Tensor:
    t = t.permute(2, 0, 1, 3)  # [B, H, S, D] -> [S, B, H, D]
    return t.contiguous() if t.numel() >= 2**31 else t  # kernels compute offsets between heads in 32 bits


def register_kernel(backend: AttentionBackend) -> None:
    """Make a backend available to Hugging Face models under the name `SAME_KERNEL`."""

    def attention(module: nn.Module, *arguments: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
        query, key, value, *_mask = arguments
        return KernelAttention.apply(query, key, value, backend, scaling), None

    ALL_ATTENTION_FUNCTIONS[SAME_KERNEL] = attention


def tiled_mlp(module: Any, x: Tensor) -> Tensor:
    """Compute the MLP of a LLaMA layer in tiles of at most as many tokens as it is wide."""

    def compute(module: Any, x: Tensor) -> Tensor:
        return module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))

    weights = [module.down_proj.weight, module.gate_proj.weight, module.up_proj.weight]
    return TiledMLP.apply(compute, module, x, math.ceil(x.shape[1] / x.shape[2]), weights)


class TiledLossModel(nn.Module):
    """A causal language model with DeepSpeed's tiled loss: the sum over this rank's tokens, times `scale`."""

    def __init__(self, causal_lm: LlamaForCausalLM) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, input_ids: Tensor, position_ids: Tensor, targets: Tensor, scale: float) -> Tensor:
        model, head = self.causal_lm.model, self.causal_lm.lm_head
        hidden = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        num_tiles = math.ceil(targets.numel() * self.causal_lm.vocab_size * 4 / LOSS_TILE_BYTES)
        loss = partial(loss_of_tile, scale)
        return TiledFusedLogitsLoss.apply(loss, head, hidden, targets, None, num_tiles, [head.weight], "sum")


def loss_of_tile(scale: float, head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the token losses, times `scale`."""
    return F.cross_entropy(head(x).float(), targets, reduction="sum") * scale


def build_causal_lm(model: ModelConfig, vocabulary: int, attention: str, dtype: torch.dtype,
                    settings: dict[str, Any]) -> LlamaForCausalLM:  # fmt: skip
    """Build the Hugging Face model of the same architecture, partitioned if the settings are those of ZeRO-3."""
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=settings["zero_optimization"]["stage"] == 3):
        causal_lm = LlamaForCausalLM._from_config(hugging_face_config(model, vocabulary), dtype=dtype,
                                                  attn_implementation=attention)  # fmt: skip
    causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    return causal_lm


def hugging_face_config(model: ModelConfig, vocabulary: int) -> LlamaConfig:
    """Return the config of the same architecture for transformers."""
    rope = {"rope_type": "default", "rope_theta": float(model.rotary_position_embeddings_theta)}
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=model.hidden_size, intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads, head_dim=model.kv_channels, rms_norm_eps=model.layernorm_epsilon,
        max_position_embeddings=model.seq_length, rope_parameters=rope, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip


@torch.no_grad()
def copy_initial_weights(causal_lm: LlamaForCausalLM, model: ModelConfig, vocabulary: int, context: Context) -> None:
    """Copy the initial weights of our own model. Collective over all ranks; each holds the whole model for a moment."""
    ours = build_model(model, vocabulary, ParallelState(), Execution(), Initialization(context.dtype, context.device))
    for name, parameter in ours.named_parameters():
        theirs, arrange = LLAMA.names(name)
        targets = [causal_lm.get_parameter(target) for target in theirs]
        with deepspeed.zero.GatheredParameters(targets, modifier_rank=0):
            if context.is_first_rank or not hasattr(targets[0], "ds_id"):
                for target, part in zip(targets, arrange(model).split(parameter), strict=True):
                    target.copy_(part)


class Samples(IterableDataset):
    """This rank's samples of the stream of random tokens; the adapter turns one of each rank into one step of each."""

    def __init__(self, lengths: Callable[[], Iterator[int]], vocab_size: int, rank: int, num_ranks: int) -> None:
        self._lengths, self._vocab_size, self._rank, self._num_ranks = lengths, vocab_size, rank, num_ranks

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        random = np.random.default_rng(1)  # as training_step.py draws them
        for index, length in enumerate(self._lengths()):
            tokens = torch.from_numpy(random.integers(0, self._vocab_size, length + 1))[None]
            if index % self._num_ranks == self._rank:
                inputs = tokens[:, :-1].contiguous()
                positions = torch.arange(length)[None]
                # The adapter's shifted labels lack the last one.
                yield {"input_ids": inputs, "labels": inputs, "position_ids": positions,
                       "targets": tokens[:, 1:].contiguous()}  # fmt: skip


class Trainer:
    """ALST's model, engine, data and checkpoint offloading on one rank."""

    def __init__(self, config: Config, context: Context, arguments: Any, num_gpus: int) -> None:
        """Build everything. Collective over all ranks."""
        model, self.device, self._num_gpus = config.model, context.device, num_gpus
        # It serves inference alone, and compiles for a minute on a machine without a GPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(auto_mpi_discovery=False)
        modeling_llama.LlamaMLP.forward = tiled_mlp
        self.backend = choose_backend(model.attention_backend, attention_request(model, self.device, context.dtype))
        register_kernel(self.backend)
        settings = deepspeed_config(config, num_gpus)
        self.vocabulary = pad_vocab_size(arguments.vocab_size, model.make_vocab_size_divisible_by)
        causal_lm = build_causal_lm(model, self.vocabulary, arguments.attention, context.dtype, settings)
        copy_initial_weights(causal_lm, model, self.vocabulary, context)
        free_memory(self.device)
        mpu = UlyssesSPAttentionHF.register_with_transformers(causal_lm, arguments.attention, num_gpus, 1)
        if mpu is not None:
            del settings["train_batch_size"]  # counts a sequence once, and ours once per rank
            reduced_in = "bf16" if config.precision.bf16 else "fp32"
            settings |= {"sequence_parallel_size": num_gpus, "seq_parallel_communication_data_type": reduced_in}
        wrapped = TiledLossModel(causal_lm)
        groups = parameter_groups(wrapped, config.optimizer.weight_decay)
        optimizer = build_adam(groups, config.optimizer, self.device, config.deepspeed.cpu_optimizer)
        if config.deepspeed.cpu_optimizer and isinstance(optimizer, torch.optim.AdamW):
            settings["zero_force_ds_cpu_optimizer"] = False
        self.engine, *_ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=settings, mpu=mpu)
        rotary = modeling_llama.LlamaRotaryEmbedding(causal_lm.config)
        causal_lm.model.rotary_emb.inv_freq = rotary.inv_freq.to(self.device)
        self._offloading = get_checkpoint_hidden_states_offloading_ctx_manager(
            use_pin_memory=self.device.type == "cuda", use_streams=self.device.type == "cuda"
        )
        self.engine.train()

    def batches(self, lengths: Callable[[], Iterator[int]], vocab_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's part of each sequence."""
        samples = Samples(lengths, vocab_size, dist.get_rank(), self._num_gpus)
        loader = DataLoader(samples, batch_size=None)
        group = dist.group.WORLD
        return UlyssesSPDataLoaderAdapter(loader, dist.get_rank(), group, self._num_gpus, self.device)

    def step(self, batches: Iterator[dict[str, Tensor]]) -> Tensor:
        """Train on the next batch; return the mean loss of this rank's tokens."""
        batch = next(batches)
        inputs = [batch[name].to(self.device) for name in ("input_ids", "position_ids", "targets")]
        with self._offloading:
            loss = self.engine(*inputs, 1 / inputs[0].numel())  # DeepSpeed averages the gradients of all ranks
            self.engine.backward(loss)
        self.engine.step()
        return loss.detach()


def measure_steps(config: Config, arguments: Any, num_gpus: int) -> Row:
    """Time whole steps, as `benchmarks.training_step.measure_steps` does. Collective over all ranks."""
    context = initialize(config)
    trainer, device, length = Trainer(config, context, arguments, num_gpus), context.device, config.model.seq_length
    warm_up = min(WARM_UP_TOKENS * num_gpus, length) if arguments.short_warm_up else length
    num_samples = math.ceil((arguments.steps + 1) / num_gpus) * num_gpus  # the adapter takes one of each rank at once
    batches = trainer.batches(lambda: iter([warm_up] + [length] * (num_samples - 1)), arguments.vocab_size)
    losses = [trainer.step(batches)]
    norm = trainer.engine.get_global_grad_norm()
    reset_peak(device)
    seconds = [wall_seconds(lambda: losses.append(trainer.step(batches)), device) for _ in range(arguments.steps)]
    peak, reserved = peak_bytes(device), reserved_bytes(device)
    reported = torch.stack([losses[0], losses[-1]])
    dist.all_reduce(reported)
    first_loss, loss = (reported / num_gpus).tolist()
    return {
        "seq_length": length, "seconds": statistics.median(seconds), "spread": spread(seconds),
        "model_flops": model_flops(config.model, trainer.vocabulary, length),
        "peak_gib": gib(peak), "reserved_gib": gib(reserved), "process_gib": gib(peak_process_bytes()),
        "attention_backend": trainer.backend.name if arguments.attention == SAME_KERNEL else arguments.attention,
        "loss": loss,
        **({} if arguments.short_warm_up else {"first_loss": first_loss, "first_gradient_norm": float(norm)}),
    }  # fmt: skip
