"""What two models must share."""

import pytest

from megatron.config import architecture_fields, describe_difference, with_rope_of
from tests.unit.config.commands import parsed


def difference(checkpoint: str, flags: str) -> str:
    return describe_difference(*(architecture_fields(parsed(words).model) for words in (checkpoint, flags)))


def test_another_context_dropout_and_kernel_are_no_difference():
    rope = "--use-rotary-position-embeddings"
    assert difference(rope, f"{rope} --seq-length 4096 --hidden-dropout 0.1 --attention-backend reference") == ""


def test_a_difference_names_the_flag_and_both_values():
    message = difference("--hidden-size 128 --swiglu --ffn-hidden-size 64", "--ffn-hidden-size 64")
    assert message == (
        "--hidden-size is 128 in the checkpoint and 64 in the flags; "
        "--kv-channels is 16 in the checkpoint and 8 in the flags; "
        "--swiglu is True in the checkpoint and False in the flags"
    )


@pytest.mark.parametrize("switch", ["--qk-layernorm", "--openai-gelu", "--parallel-residual", "--add-qkv-bias"])
def test_what_a_block_computes_belongs_to_the_architecture(switch):
    assert difference(f"--disable-bias-linear {switch}", "--disable-bias-linear") == (
        f"{switch} is True in the checkpoint and False in the flags"
    )


def test_the_number_of_positions_matters_only_where_they_are_learned():
    assert "--max-position-embeddings is 2048" in difference("--max-position-embeddings 2048", "")


def test_rotary_settings_matter_only_with_rotary_positions():
    assert "rotary_percent" not in architecture_fields(parsed().model)
    message = difference("--use-rotary-position-embeddings --rotary-percent 0.5", "--use-rotary-position-embeddings")
    assert message == "--rotary-percent is 0.5 in the checkpoint and 1.0 in the flags"


def test_the_parameters_of_a_rope_scaling_matter_where_it_uses_them():
    rope = "--use-rotary-position-embeddings"
    linear = f"{rope} --rope-scaling-type linear --rope-scaling-factor"
    assert "rope_scaling_factor" not in architecture_fields(parsed(rope).model)
    assert difference(f"{linear} 2", f"{linear} 4") == (
        "--rope-scaling-factor is 2.0 in the checkpoint and 4.0 in the flags"
    )
    assert difference(f"{linear} 2", rope) == (
        "--rope-scaling-type is linear in the checkpoint and none in the flags; "
        "--rope-scaling-factor is 2.0 in the checkpoint and absent in the flags"
    )


def test_theta_and_scaling_alone_come_from_the_other_model():
    own = "--use-rotary-position-embeddings --rotary-position-embeddings-theta 5e6 --rope-scaling-type linear"
    model = parsed(f"{own} --rope-scaling-factor 4 --swiglu").model
    taken = with_rope_of(model, parsed("--use-rotary-position-embeddings --rotary-percent 0.5").model)
    assert describe_difference(architecture_fields(taken), architecture_fields(model)) == (
        "--ffn-hidden-size is 256 in the checkpoint and 128 in the flags; "
        "--rotary-percent is 0.5 in the checkpoint and 1.0 in the flags; "
        "--swiglu is False in the checkpoint and True in the flags"
    )


def test_a_value_that_one_side_lacks_is_absent():
    assert describe_difference({"num_layers": 2}, {}) == "--num-layers is 2 in the checkpoint and absent in the flags"
