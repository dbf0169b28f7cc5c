"""What DeepSpeed is handed, and what the user's file adds."""

import json
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from deepspeed.monitor.config import CSVConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from megatron.config import Config, ConfigError, deepspeed_config
from megatron.config.deepspeed_json import NEVER
from megatron.config.deepspeed_keys import DEEPSPEED_KEYS, Keys
from tests.unit.config.commands import complaint, parsed


def with_json(folder: Path, content: Any, flags: str = "") -> str:
    file = folder / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return f"--deepspeed-config {file} {flags}"


def from_json(folder: Path, content: Any, flags: str = "") -> Config:
    return parsed(with_json(folder, content, flags))


def test_without_a_file_the_flags_make_the_whole_dict():
    assert deepspeed_config(parsed("--clip-grad 0.5 --zero-stage 2"), world_size=1) == {
        "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }


def test_deepspeed_counts_sequence_parallel_ranks_as_data_parallel():
    config = parsed("--ds-sequence-parallel-size 2 --micro-batch-size 3 --global-batch-size 24")
    made = deepspeed_config(config, world_size=8)
    assert made["gradient_accumulation_steps"] == 2
    assert made["train_batch_size"] == 3 * 2 * 8


def test_what_no_flag_says_passes_through(tmp_path):
    stated = {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "reduce_bucket_size": 7},
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "comms_logger": {"enabled": True},
        "steps_per_print": 5,
    }
    made = deepspeed_config(from_json(tmp_path, stated), world_size=1)
    assert made["zero_optimization"].items() >= stated["zero_optimization"].items()
    assert made["bf16"] == stated["bf16"]
    assert made["comms_logger"] == {"enabled": True}
    assert made["steps_per_print"] == 5


@pytest.mark.parametrize(
    "flags, prefetched, live",
    [("", 50_000_000, 1_000_000_000), ("--hidden-size 8192 --num-attention-heads 64", 805_306_368, 2_415_919_104)],
)
def test_zero_3_gathers_a_whole_block_ahead(flags, prefetched, live):
    """A GPT block has 12 h^2 weights."""
    zero = deepspeed_config(parsed(f"--zero-stage 3 {flags}"), world_size=1)["zero_optimization"]
    assert zero["stage3_prefetch_bucket_size"] == prefetched
    assert zero["stage3_max_live_parameters"] == live


def test_how_far_zero_3_gathers_ahead_is_the_file_s_to_say(tmp_path):
    config = from_json(tmp_path, {"zero_optimization": {"stage3_prefetch_bucket_size": 5}}, "--zero-stage 3")
    assert deepspeed_config(config, world_size=1)["zero_optimization"]["stage3_prefetch_bucket_size"] == 5


def test_making_the_dict_leaves_the_configuration_as_it_was(tmp_path):
    config = from_json(
        tmp_path, {"zero_optimization": {"offload_optimizer": {"pin_memory": True}}}, "--zero-stage 1 --cpu-optimizer"
    )
    before = config.to_dict()
    made = deepspeed_config(config, world_size=1)
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    made["zero_optimization"]["offload_optimizer"]["pin_memory"] = False
    assert config.to_dict() == before


def test_fp16_carries_the_loss_scale_settings():
    fp16 = deepspeed_config(parsed("--fp16 --initial-loss-scale 4096 --hysteresis 3"), world_size=1)["fp16"]
    assert fp16 == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 12,
        "loss_scale_window": 1000,
        "hysteresis": 3,
        "min_loss_scale": 1,
    }


@pytest.mark.parametrize(("flags", "stage"), [("--bf16", 2), ("--bf16 --zero-stage 1", 2), ("--zero-stage 1", 1)])
def test_gradients_summed_in_fp32_run_as_stage_2_in_half_precision(tmp_path, flags, stage):
    config = from_json(tmp_path, {"data_types": {"grad_accum_dtype": "fp32"}}, flags)
    assert deepspeed_config(config, 2)["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("power", [5000, 10**30, -5000])
def test_a_loss_scale_past_what_fp32_holds_is_refused(tmp_path, power):
    stated = {"fp16": {"enabled": True, "initial_scale_power": power}}
    assert "--initial-loss-scale (" in complaint(with_json(tmp_path, stated))


def test_a_smallest_loss_scale_keeps_its_fraction(tmp_path):
    stated = {"fp16": {"enabled": True, "min_loss_scale": 1.5}}
    assert deepspeed_config(from_json(tmp_path, stated), 1)["fp16"]["min_loss_scale"] == 1.5


def test_the_file_speaks_where_the_flags_are_silent(tmp_path):
    stated = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.3,
        "zero_optimization": {"stage": 1},
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 11, "loss_scale_window": 500},
        "bf16": {"enabled": False},
    }
    config = from_json(tmp_path, stated)
    assert (config.training.global_batch_size, config.training.micro_batch_size) == (8, 2)
    assert (config.optimizer.clip_grad, config.deepspeed.zero_stage) == (0.3, 1)
    assert config.precision.fp16
    assert (config.precision.loss_scale, config.precision.initial_loss_scale) == (None, 2048.0)
    assert config.precision.loss_scale_window == 500
    assert complaint(with_json(tmp_path, stated)) == ""


def test_loss_scale_settings_in_a_file_with_fp16_off_mean_nothing(tmp_path):
    stated = {"fp16": {"enabled": False, "loss_scale": 128}}
    assert from_json(tmp_path, stated).precision.loss_scale is None
    assert complaint(with_json(tmp_path, stated, "--bf16")) == ""


def test_auto_says_nothing(tmp_path):
    stated = {"train_batch_size": "auto", "gradient_accumulation_steps": "auto", "bf16": {"enabled": "auto"}}
    assert complaint(with_json(tmp_path, stated, "--bf16 --global-batch-size 4")) == ""


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not valid JSON"),
        ('{"a": ' * 100_000, "is not valid JSON"),
        ("[]", "must hold a JSON object, not a list"),
        ({"bf16": True}, '"bf16" (true) in '),
        (
            {"train_batch_size": "many"},
            '"train_batch_size" ("many") in the DeepSpeed JSON must be a whole number; correct it or',
        ),
        ({"train_batch_size": True}, '"train_batch_size" (true) in the DeepSpeed JSON must be a whole number'),
        ({"gradient_clipping": "x"}, "must be a whole number or a number"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, content, message):
    with pytest.raises(ConfigError) as caught:
        from_json(tmp_path, content)
    assert message in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"cannot be read \(No such file or directory\); give the path of a JSON file"
    ):
        parsed(f"--deepspeed-config {tmp_path / 'none.json'}")


@pytest.mark.parametrize(
    "stated, flags, message",
    [
        (
            {"zero_optimization": {"stage": 2}},
            "--zero-stage 3",
            "must agree with --zero-stage (3); remove it from the file or give --zero-stage 2",
        ),
        ({"train_batch_size": 4}, "--global-batch-size 8", "remove it from the file or give --global-batch-size 4"),
        ({"train_micro_batch_size_per_gpu": 4}, "--micro-batch-size 2", "must agree with --micro-batch-size (2)"),
        ({"gradient_clipping": 0.5}, "--clip-grad 1.0", '"gradient_clipping" (0.5)'),
        (
            {"bf16": {"enabled": True}},
            "--fp16",
            "must agree with --bf16, which is not given; correct the file or add --bf16",
        ),
        (
            {"fp16": {"enabled": False}},
            "--fp16",
            "must agree with --fp16, which is given; correct the file or remove --fp16",
        ),
        ({"fp16": {"enabled": True, "hysteresis": 4}}, "--fp16 --hysteresis 2", '"fp16.hysteresis" (4)'),
        ({"zero_optimization": {"stage": 5}}, "", "--zero-stage (5) must be at least 0 and at most 3"),
        (
            {"gradient_accumulation_steps": 4},
            "--global-batch-size 2",
            "= 2; remove it from the file or give --global-batch-size 4",
        ),
        ({"optimizer": {"type": "Adam"}}, "", '"optimizer" in '),
        ({"scheduler": {}}, "", "is not read from there; remove it: give --lr-decay-style"),
        ({"zero_optimisation": {}}, "", 'did you mean "zero_optimization"?'),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "", '"zero_optimization.reduce_bucket_size" ("auto")'),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "",
            "needs --zero-stage 3, and it is 2",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "",
            "needs --zero-stage 1, 2 or 3, and it is 0",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "--zero-stage 1 --cpu-optimizer",
            'must be "cpu" with --cpu-optimizer; remove one of the two',
        ),
        ({"checkpoint": {"writer": {"type": "FAST"}}}, "", '"checkpoint.writer" ({"type": "FAST"}) in '),
        ({"checkpoint": {"use_node_local_storage": True}}, "", "in a folder that all machines share; correct it or"),
        ({"gradient_allreduce_op": "sum"}, "", '("sum") in FILE must be "mean": a sum multiplies the gradient by the'),
        ({"gradient_predivide_factor": 2.0}, "", '"gradient_predivide_factor" (2.0) in FILE must be 1.0: '),
        ({"sparse_gradients": False}, "", "is not read from there; remove it: DeepSpeed 0.19.8 does not have it"),
        ({"prescale_gradients": "false"}, "", '"prescale_gradients" ("false") in FILE must be false or true'),
        ({"prescale_gradients": True}, "--zero-stage 2", "needs --zero-stage 0 or 1, and it is 2; remove it"),
        (
            {"communication_data_type": "bf16"},
            "",
            '_data_type" ("bf16") in FILE must be "fp32", so',
        ),
        ({"communication_data_type": "fp16"}, "--bf16", 'must be "bf16" or "fp32", so that the sum of the gradients'),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            "",
            'grad_accum_dtype" ("bf16") in FILE must be "fp32"; ',
        ),
        (
            {"data_types": {"grad_accum_dtype": "fp16"}},
            "--bf16",
            'must be "bf16" or "fp32"; correct it or remove it',
        ),
        (
            {"bf16": {"bf16_master_weights_and_grads": True}},
            "--bf16",
            '_master_weights_and_grads" (true) in ',
        ),
        ({"fp16": {"auto_cast": True}}, "--fp16", '"fp16.auto_cast" (true) in FILE must be false'),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "", "the arithmetic with it is not tested here"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "", "(8) in FILE must be 1: the arithmetic"),
        ({"zero_optimization": {"round_robin_gradient": True}}, "", 'did you mean "round_robin_gradients"?'),
        ({"zero_optimization": {"cpu_offload": True}}, "", 'write "offload_optimizer"'),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "", 'here; did you mean "device"?'),
        (
            {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}},
            "",
            '"zero_optimization.offload_optimizer.ratio" ',
        ),
        ({"zero_optimization": {"offload_optimizer": True}}, "", "must be an object of device, nvme_path"),
        ({"zero_optimization": {"mics_shard_size": 4}}, "", "DeepSpeed 0.19.8 does not have it any more"),
    ],
)
def test_a_file_that_contradicts_the_flags_is_refused(tmp_path, stated, flags, message):
    assert message in complaint(with_json(tmp_path, stated, flags)).replace(str(tmp_path / "ds.json"), "FILE")


@pytest.mark.parametrize("stage", range(4))
def test_the_files_of_upstream_s_scripts_pass(tmp_path, stage):
    stated = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10,
        "zero_optimization": {"stage": stage, "elastic_checkpoint": True},
        "gradient_clipping": 1.0,
        "prescale_gradients": stage < 2,
        "fp16": {"enabled": False, "loss_scale": 0, "loss_scale_window": 500, "consecutive_hysteresis": False},
        "bf16": {"enabled": True},
        "wall_clock_breakdown": False,
    }
    assert complaint(with_json(tmp_path, stated, "--bf16 --global-batch-size 4")) == ""


def _names(keys: Keys) -> Iterator[str]:
    for name, key in keys.items():
        yield name
        yield from _names(key) if isinstance(key, Mapping) else ()


def test_every_key_of_deepspeed_is_honored_or_refused_by_name():
    """As far as its own dataclasses tell; so a new version of DeepSpeed shows what it has added."""
    models = {
        ("zero_optimization",): DeepSpeedZeroConfig,
        ("zero_optimization", "offload_optimizer"): DeepSpeedZeroOffloadOptimizerConfig,
        ("zero_optimization", "offload_param"): DeepSpeedZeroOffloadParamConfig,
        ("bf16",): DeepSpeedBF16Config,
        ("fp16",): DeepSpeedFP16Config,
        ("csv_monitor",): CSVConfig,
    }
    for path, model in models.items():
        known = reduce(lambda keys, name: keys[name], path, DEEPSPEED_KEYS)
        theirs = {field.alias or name for name, field in model.model_fields.items()}
        assert theirs <= set(known), path


def test_the_documentation_names_every_key():
    text = (Path(__file__).parents[3] / "docs" / "deepspeed.md").read_text()
    assert [name for name in _names(DEEPSPEED_KEYS) if f"`{name}`" not in text] == []


def test_agreement_is_fine(tmp_path):
    stated = {
        "train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
    }
    assert complaint(with_json(tmp_path, stated, "--bf16 --zero-stage 3 --global-batch-size 4")) == ""


def test_cpu_optimizer_needs_zero():
    assert complaint("--cpu-optimizer").endswith("give --zero-stage 1 or remove --cpu-optimizer")
