"""The configuration as a value."""

import json

import pytest

from megatron.config import Config, ConfigError, ModelConfig, Recompute
from tests.unit.config.commands import parsed


def test_a_configuration_survives_json(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}')
    config = parsed(f"--data-path 1 a 2 b --bf16 --data-impl mmap --deepspeed-config {file}")
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("recompute", Recompute)
def test_an_enum_is_written_as_its_word_and_read_as_itself(recompute):
    config = parsed(f"--ds-sequence-parallel-fpdt-recompute {recompute.value.upper()}")
    plain = config.to_dict()
    assert type(plain["parallel"]["ds_sequence_parallel_fpdt_recompute"]) is str
    read = Config.from_dict(json.loads(json.dumps(plain)))
    assert read.parallel.ds_sequence_parallel_fpdt_recompute is recompute
    plain["parallel"]["ds_sequence_parallel_fpdt_recompute"] = "some"
    with pytest.raises(ConfigError, match=r"section 'parallel' does not fit \('some' is not a valid Recompute\)"):
        Config.from_dict(plain)


def test_a_field_of_another_version_takes_no_part():
    plain = parsed().to_dict()
    plain["model"]["of_the_future"] = 1
    del plain["logging"]["progress"]
    assert Config.from_dict(plain) == parsed()


def test_a_missing_required_field_is_named():
    plain = parsed().to_dict()
    del plain["model"]["num_layers"]
    with pytest.raises(ConfigError, match=r"section 'model' does not fit .*num_layers.*give the settings as flags"):
        Config.from_dict(plain)


def test_resolving_a_model_twice_changes_nothing():
    model = ModelConfig(num_layers=1, hidden_size=96, num_attention_heads=4, seq_length=8, swiglu=True).resolved()
    assert model.resolved() == model
    assert (model.ffn_hidden_size, model.kv_channels) == (256, 24)
