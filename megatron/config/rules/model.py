"""Rules between the model's sizes, attention kernel, number format and device."""

from __future__ import annotations

from megatron.config.model import ROPE_SCALING_PARAMETERS
from megatron.config.rules.common import Rule, Run, divisors, flag, given_flags, listed, nearest_multiples, shown

GPU_BACKENDS = ("torch-flash", "cudnn", "flash-2", "flash-attn-2", "flash-attn-3", "flash-attn-4")


def heads_divide_hidden_size(run: Run) -> str | None:
    model = run.config.model
    is_given = bool(given_flags(run.config, ["kv_channels"])) or model.hf_model is not None
    if is_given or model.num_attention_heads * model.kv_channels == model.hidden_size:
        return None
    sizes = nearest_multiples(model.hidden_size, model.num_attention_heads)
    return (
        f"{shown(run.config, 'hidden_size')} must be a multiple of {shown(run.config, 'num_attention_heads')} unless "
        f"--kv-channels sets the width of a head; use {listed(sizes)}, or add --kv-channels"
    )


def key_value_heads_divide_heads(run: Run) -> str | None:
    model = run.config.model
    if model.num_attention_heads % model.num_key_value_heads == 0:
        return None
    return (
        f"{shown(run.config, 'num_key_value_heads')} must divide {shown(run.config, 'num_attention_heads')}; "
        f"use {listed(divisors(model.num_attention_heads))}"
    )


def rotary_width_is_even(run: Run) -> str | None:
    model = run.config.model
    width = int(model.kv_channels * model.rotary_percent)
    is_rotated = model.use_rotary_position_embeddings and model.hf_model is None
    if not is_rotated or (width > 0 and width % 2 == 0):
        return None
    if model.rotary_percent == 1.0:
        return (
            f"RoPE rotates pairs of dimensions, so the width of a head ({model.kv_channels}) must be even; "
            f"use --kv-channels {listed(nearest_multiples(model.kv_channels, 2))}"
        )
    if model.kv_channels < 2:
        return (
            f"RoPE rotates pairs of dimensions, so the width of a head ({model.kv_channels}) must be at least 2; use "
            "--kv-channels 2"
        )
    near = [even for even in nearest_multiples(width, 2) if even <= model.kv_channels]
    percents = [_percent_for(even, model.kv_channels) for even in near]
    return (
        f"{shown(run.config, 'rotary_percent')} of a head's {model.kv_channels} dimensions is {width}, which must be "
        f"even and above 0; use --rotary-percent {listed(percents)}"
    )


def _percent_for(width: int, kv_channels: int) -> str:
    """Return the shortest decimal fraction of `kv_channels` that rounds down to `width`."""
    for digits in range(1, 17):
        text = f"{width / kv_channels:.{digits}f}"
        if int(kv_channels * float(text)) == width and float(text) <= 1:
            return text
    return repr(width / kv_channels)


def rope_scaling_has_what_it_needs(run: Run) -> str | None:
    model, kind = run.config.model, run.config.model.rope_scaling_type
    needed = ("rope_scaling_factor", "rope_scaling_original_max_position_embeddings")
    missing = [name for name in needed if name in ROPE_SCALING_PARAMETERS[kind] and getattr(model, name) is None]
    if missing:
        flags = listed([flag(name) for name in missing], "and")
        return f"--rope-scaling-type {kind} needs {flags}, which say by how much and from which context; add {flags}"
    if kind == "dynamic" and int(model.kv_channels * model.rotary_percent) < 4:
        return (
            "--rope-scaling-type dynamic needs at least 4 rotated dimensions in each head, and there are 2; raise "
            "--kv-channels or --rotary-percent, or use another type"
        )
    return None


def rope_scaling_borders_are_in_order(run: Run) -> str | None:
    borders = {
        "yarn": ("rope_scaling_beta_fast", "rope_scaling_beta_slow"),
        "llama3": ("rope_scaling_high_freq_factor", "rope_scaling_low_freq_factor"),
    }
    model = run.config.model
    fast, slow = borders.get(model.rope_scaling_type, ("", ""))
    if not fast or getattr(model, fast) > getattr(model, slow):
        return None
    if model.rope_scaling_type == "yarn" and getattr(model, fast) == getattr(model, slow):
        return None  # a sharp border is fine for yarn; llama3 would divide by zero
    return (
        f"{shown(run.config, fast)} must be above {shown(run.config, slow)}; raise {flag(fast)} or lower {flag(slow)}"
    )


def yarn_has_one_attention_factor(run: Run) -> str | None:
    model = run.config.model
    mscales = ("rope_scaling_mscale", "rope_scaling_mscale_all_dim")
    given = [name for name in mscales if getattr(model, name) is not None]
    if not given:
        return None
    if len(given) == 1:
        (other,) = set(mscales) - set(given)
        return f"{shown(run.config, given[0])} has no effect alone; add {flag(other)}, or remove {flag(given[0])}"
    if model.rope_scaling_attention_factor is not None:
        return (
            f"{shown(run.config, 'rope_scaling_attention_factor')} and {flag(given[0])} both set the scale of "
            "attention; keep one of them"
        )
    return None


def sequence_fits_positions(run: Run) -> str | None:
    model = run.config.model
    if model.seq_length <= model.max_position_embeddings:
        return None
    if model.hf_model is not None:
        return (
            f"{shown(run.config, 'seq_length')} must be at most the {model.max_position_embeddings} positions that "
            f"{shown(run.config, 'hf_model')} has learned; shorten the sequence to {model.max_position_embeddings}"
        )
    return (
        f"{shown(run.config, 'seq_length')} must be at most {shown(run.config, 'max_position_embeddings')}; shorten "
        f"the sequence to {model.max_position_embeddings} or raise --max-position-embeddings to {model.seq_length}"
    )


def positions_are_given(run: Run) -> str | None:
    model = run.config.model
    if not model.no_position_embedding or model.use_rotary_position_embeddings:
        return None
    return (
        "--no-position-embedding would leave the model without positions; add --use-rotary-position-embeddings, or "
        "remove it for a learned table"
    )


def one_number_format(run: Run) -> str | None:
    if not (run.config.precision.fp16 and run.config.precision.bf16):
        return None
    return "--fp16 and --bf16 exclude each other and both are on; keep one of them, or neither for fp32"


def device_computes_in_fp16(run: Run) -> str | None:
    if not run.config.precision.fp16 or run.device_type != "cpu":
        return None
    return f"--fp16 needs a GPU, and the device is {run.device_type}; use --bf16, or neither for fp32"


def attention_backend_fits_the_device(run: Run) -> str | None:
    backend = run.config.model.attention_backend
    if backend in GPU_BACKENDS and run.device_type == "cpu":
        return f"--attention-backend {backend} needs a GPU, and the device is cpu; use auto, torch-cpu or reference"
    if backend == "torch-cpu" and run.device_type != "cpu":
        return f"--attention-backend torch-cpu runs on CPUs only, and the device is {run.device_type}; use auto"
    return None


def attention_backend_fits_the_number_format(run: Run) -> str | None:
    precision, backend = run.config.precision, run.config.model.attention_backend
    if backend not in GPU_BACKENDS or precision.fp16 or precision.bf16:
        return None
    return (
        f"--attention-backend {backend} computes in bf16 or fp16, and this run is in fp32; add --bf16, or use auto "
        "or reference"
    )


def attention_dropout_can_be_replayed(run: Run) -> str | None:
    dropout = run.config.model.attention_dropout
    if dropout == 0 or not run.config.parallel.ds_sequence_parallel_fpdt:
        return None
    return (
        f"{shown(run.config, 'attention_dropout')} must be 0 with --ds-sequence-parallel-fpdt, whose backward pass "
        "of an attention tile cannot replay a dropout mask; use --attention-dropout 0 (--hidden-dropout is replayed "
        "exactly)"
    )


def attention_dropout_has_a_kernel(run: Run) -> str | None:
    if run.config.model.attention_dropout == 0 or run.config.model.attention_backend == "auto":
        return None
    return (
        f"{shown(run.config, 'attention_dropout')} must be 0 where --attention-backend "
        f"({run.config.model.attention_backend}) is forced, as only torch's own attention applies it; use "
        "--attention-dropout 0, or leave the choice to --attention-backend auto"
    )


# Rules that depend on the architecture alone.
ARCHITECTURE_RULES: tuple[Rule, ...] = (
    key_value_heads_divide_heads,
    rotary_width_is_even,
    rope_scaling_has_what_it_needs,
    rope_scaling_borders_are_in_order,
    yarn_has_one_attention_factor,
)
MODEL_RULES: tuple[Rule, ...] = (
    heads_divide_hidden_size,
    *ARCHITECTURE_RULES,
    sequence_fits_positions,
    positions_are_given,
    one_number_format,
    device_computes_in_fp16,
    attention_backend_fits_the_device,
    attention_backend_fits_the_number_format,
    attention_dropout_can_be_replayed,
    attention_dropout_has_a_kernel,
)
