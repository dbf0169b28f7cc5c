"""What two models must share."""

from megatron.config import architecture_fields, describe_difference
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


def test_the_number_of_positions_matters_only_where_they_are_learned():
    assert "--max-position-embeddings is 2048" in difference("--max-position-embeddings 2048", "")


def test_rotary_settings_matter_only_with_rotary_positions():
    assert "rotary_percent" not in architecture_fields(parsed().model)
    message = difference("--use-rotary-position-embeddings --rotary-percent 0.5", "--use-rotary-position-embeddings")
    assert message == "--rotary-percent is 0.5 in the checkpoint and 1.0 in the flags"


def test_a_value_that_one_side_lacks_is_absent():
    assert describe_difference({"num_layers": 2}, {}) == "--num-layers is 2 in the checkpoint and absent in the flags"
