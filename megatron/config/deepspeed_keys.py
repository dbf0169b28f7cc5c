"""The keys of a DeepSpeed JSON: the values of each that are honored here, and why the others are refused.

A key is accepted if its effect is tested here (`tests/distributed/test_deepspeed_keys.py` compares gradients) or if it
does not change the arithmetic. All other keys that DeepSpeed 0.19.8 knows are refused by name: DeepSpeed itself
silently ignores some of them, and computes something else with others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Key:
    """The `values` that are honored (None: all), and why the others are not or what to use instead."""

    values: tuple[object, ...] | None = None
    advice: str = ""

    def allows(self, value: object) -> bool:
        """Whether a value is honored."""
        return self.values is None or value in self.values


Keys = Mapping[str, "Key | Keys"]

ANY = Key()
HERE = "training here does not use it"
REMOVED = "DeepSpeed 0.19.8 does not have it any more"
UNTESTED = "the arithmetic with it is not tested here"
PRECISION = "give --bf16 or --fp16"
OFFLOAD = 'write "offload_optimizer" or "offload_param": {"device": "cpu"}'


def only(*values: object, advice: str) -> Key:
    """Return a key that honors only these values."""
    return Key(values, advice)


def refused(advice: str) -> Key:
    """Return a key that honors no value."""
    return Key((), advice)


def anything(*names: str) -> dict[str, Key | Keys]:
    """Return keys that honor all values."""
    return dict.fromkeys(names, ANY)


_OFFLOAD_OPTIMIZER: Keys = {
    **anything("device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init"),
    "ratio": only(1.0, advice=UNTESTED),
    "super_offload": only(False, advice=UNTESTED),
    "cpuadam_cores_perc": refused("it belongs to super_offload, which is refused"),
}
_ZERO: Keys = {
    **anything("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions"),
    **anything("use_multi_rank_bucket_allreduce", "allgather_bucket_size", "overlap_comm", "elastic_checkpoint"),
    **anything("sub_group_size", "ignore_unused_parameters", "round_robin_gradients", "parameter_alignment"),
    **anything("memory_efficient_linear", "log_trace_cache_warnings", "enable_sanity_checks"),
    **anything("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters"),
    **anything("stage3_model_persistence_threshold", "stage3_max_reuse_distance", "stage3_allgather_sequential"),
    **anything("stage3_use_all_reduce_for_fetch_params", "stage3_gather_16bit_weights_on_model_save"),
    **anything("stage3_gather_fp16_weights_on_model_save"),
    "offload_optimizer": _OFFLOAD_OPTIMIZER,
    "offload_param": anything("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"),
    "compute_grad_norm": only(True, advice="the log reports the norm"),
    "load_from_fp32_weights": only(True, advice="weights are loaded from the fp32 masters"),
    "legacy_stage1": only(False, advice=REMOVED),
    "override_module_apply": only(True, advice=UNTESTED),
    "pipeline_loading_checkpoint": only(False, advice=HERE),
    "stage3_module_granularity_threshold": only(0, advice="which modules ZeRO-3 gathers whole is set here"),
    "zero_hpz_partition_size": only(1, advice=UNTESTED),
    "zero_quantized_weights": only(False, advice=UNTESTED),
    "zero_quantized_nontrainable_weights": only(False, advice=UNTESTED),
    "zero_quantized_gradients": only(False, advice=UNTESTED),
    "cpu_offload": only(False, advice=OFFLOAD),
    "cpu_offload_param": only(False, advice=OFFLOAD),
    "cpu_offload_use_pin_memory": refused(OFFLOAD),
    "leaf_module": refused("which modules ZeRO-3 gathers whole is set here"),
    "mics_shard_size": refused(REMOVED),
    "mics_hierarchical_params_gather": refused(REMOVED),
    "save_muon_momentum_buffer_in_memory": refused("the optimizer is Adam"),
    "zenflow": refused(UNTESTED),
    "zeropp_loco_param": refused(REMOVED),
}
DEEPSPEED_KEYS: Keys = {
    **anything("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    **anything("gradient_clipping", "disable_python_gc", "dump_state", "log_level", "memory_breakdown"),
    **anything("steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer"),
    **anything("zero_force_ds_cpu_optimizer"),
    "aio": anything(
        "block_size",
        "queue_depth",
        "intra_op_parallelism",
        "single_submit",
        "overlap_events",
        "use_gds",
        "thread_count",
    ),
    "comms_logger": anything("enabled", "prof_all", "prof_ops", "verbose", "debug"),
    "csv_monitor": anything("enabled", "output_path", "job_name"),
    "flops_profiler": anything(
        "enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"
    ),
    "timers": {"throughput": anything("enabled", "synchronized")},
    "zero_optimization": _ZERO,
    "bf16": {
        **anything("enabled", "check_grad_overflow"),
        "immediate_grad_update": only(False, advice=UNTESTED),
        "bf16_master_weights_and_grads": only(False, advice=UNTESTED),
        "bf16_optimizer_states": only(False, advice=UNTESTED),
    },
    "fp16": {
        **anything("enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"),
        **anything("min_loss_scale"),
        "auto_cast": only(False, advice="the model is in fp16 already"),
        "consecutive_hysteresis": only(False, advice="give --hysteresis and --loss-scale-window"),
        "fp16_master_weights_and_grads": only(False, advice=UNTESTED),
    },
    "checkpoint": {
        "tag_validation": ANY,
        "load_universal": only(False, advice="give --universal-checkpoint"),
        "parallel_write": {"pipeline_stage": only(False, advice=HERE)},
        "use_node_local_storage": only(
            False, advice="a checkpoint is complete only in a folder that all machines share"
        ),
        "writer": only(
            None,
            advice="a checkpoint appears when every file is on the disk, and DeepSpeed's other writers do not wait "
            "for that",
        ),
    },
    # The stage and the number format restrict these further: `megatron.config.rules.deepspeed`.
    "communication_data_type": only(None, "fp32", "bf16", "fp16", advice=UNTESTED),
    "data_types": {
        "grad_accum_dtype": only(None, "fp32", "bf16", "fp16", advice=UNTESTED),
        "param_dtype": refused(PRECISION),
        "buffer_dtype": refused(PRECISION),
        "keep_in_fp32_modules": refused(UNTESTED),
    },
    "prescale_gradients": only(False, True, advice="it is a switch"),
    "gradient_allreduce_op": only("mean", advice="a sum multiplies the gradient by the number of ranks"),
    "gradient_predivide_factor": only(1.0, advice="the gradient is the mean over the ranks with every factor"),
    "disable_allgather": only(False, advice="DeepSpeed 0.19.8 ignores it"),
    "sparse_gradients": refused(REMOVED),
    "activation_checkpointing": refused("give --deepspeed-activation-checkpointing and --checkpoint-in-cpu"),
    "amp": refused(PRECISION),
    "autotuning": refused(HERE),
    "bfloat16": refused('call it "bf16"'),
    "comet": refused("give --tensorboard-dir or --wandb-project"),
    "compile": refused(HERE),
    "compression_training": refused(REMOVED),
    "curriculum_learning": refused("give --seq-length-schedule, which reads the tokens that a truncated sample loses"),
    "data_efficiency": refused(HERE),
    "dataloader_drop_last": refused(HERE),
    "datastates_ckpt": refused(HERE),
    "eigenvalue": refused(REMOVED),
    "elasticity": refused(REMOVED),
    "expert_parallel": refused(HERE),
    "hybrid_engine": refused(HERE),
    "managed_gradient_accumulation": refused(UNTESTED),
    "nebula": refused(REMOVED),
    "optimizer": refused("give --lr, --weight-decay, --adam-beta1, --adam-beta2 and --adam-eps"),
    "pipeline": refused(HERE),
    "progressive_layer_drop": refused(HERE),
    "quantize_training": refused(REMOVED),
    "scheduler": refused("give --lr-decay-style, --lr-warmup-iters and the like"),
    "seq_parallel_communication_data_type": refused(HERE),
    "sequence_parallel_size": refused("give --ds-sequence-parallel-size"),
    "sparse_attention": refused(HERE),
    "tensor_parallel": refused(HERE),
    "tensorboard": refused("give --tensorboard-dir"),
    "torch_autocast": refused(PRECISION),
    "use_data_before_expert_parallelism": refused(HERE),
    "wandb": refused("give --wandb-project"),
    "weight_quantization": refused(HERE),
}
