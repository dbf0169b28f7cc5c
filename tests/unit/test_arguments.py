"""From argv to Config."""

from dataclasses import FrozenInstanceError, fields

import pytest

from megatron.arguments import build_parser, field_descriptions, parse_args
from megatron.config import ConfigError, config_sections
from tests.unit.config.commands import GPT, parsed

FPDT_SCRIPT = """
    --override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 --tensor-model-parallel-size 1
    --ds-sequence-parallel-fpdt --ds-sequence-parallel-fpdt-chunk-size 65536
    --ds-sequence-parallel-fpdt-offloading --ds-sequence-parallel-size 4 --init-method-std 0.009
    --lr-decay-tokens 300000000000 --lr-warmup-tokens 3000000000 --micro-batch-size 1 --exit-duration-in-mins
    30000000 --global-batch-size 1 --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length
    262144 --max-position-embeddings 262144 --train-tokens 300000000000 --lr 1.2e-4 --min-lr 1.0e-6
    --lr-decay-style cosine --split 949,50,1 --log-interval 10 --eval-interval 100 --eval-iters 10
    --save-interval 100 --weight-decay 0.1 --attention-dropout 0.0 --hidden-dropout 0.0 --clip-grad 1.0
    --hysteresis 2 --num-workers 0 --fp16 --seed 1234 --load checkpoints --save checkpoints
    --no-async-tensor-model-parallel-allreduce --use-flash-attn-v2 --tensorboard-queue-size 1
    --use-rotary-position-embeddings --rotary-percent 0.25 --rotary-position-embeddings-theta 100000000
    --log-timers-to-tensorboard --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard
    --tensorboard-dir tensorboard --checkpoint-activations --vocab-file vocab.json --merge-file merges.txt
    --data-path text_document --data-impl mmap --deepspeed --zero-stage 3 --pipeline-model-parallel-size 1
    --no-pipeline-parallel --deepspeed-activation-checkpointing --checkpoint-in-cpu --local_rank=3
"""


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_args(words)
    return str(caught.value)


def test_megatron_deepspeed_fpdt_flags_are_understood():
    config = parse_args(FPDT_SCRIPT.split())
    assert config.parallel.ds_sequence_parallel_size == 4
    assert config.parallel.ds_sequence_parallel_fpdt_offloading
    assert config.parallel.local_rank == 3
    assert config.model.attention_backend == "flash-2"
    assert config.model.rotary_position_embeddings_theta == 1e8
    assert config.training.train_tokens == 300_000_000_000
    assert config.deepspeed.zero_stage == 3


def test_every_flag_without_effect_leaves_a_note():
    notes = parse_args(FPDT_SCRIPT.split()).notes
    assert "--num-workers has no effect: one thread prefetches --prefetch-microbatches micro-batches" in notes
    assert len(notes) == 8
    assert parsed().notes == ()


def test_an_upstream_flag_with_a_meaning_that_differs_is_refused():
    assert "'cached' is not known; use one of mmap, infer" in refusal(*GPT, "--data-impl", "cached")


def test_derived_widths_are_filled_in():
    model = parse_args(GPT).model
    assert (model.ffn_hidden_size, model.num_key_value_heads, model.kv_channels) == (256, 8, 8)
    assert model.max_position_embeddings == 1024


def test_swiglu_width_is_two_thirds_rounded_down_to_a_multiple_of_64():
    assert parsed("--swiglu --hidden-size 4096").model.ffn_hidden_size == 10880
    assert parsed("--swiglu --hidden-size 8").model.ffn_hidden_size == 64


def test_a_given_width_is_kept():
    model = parsed("--swiglu --ffn-hidden-size 172 --num-key-value-heads 2 --kv-channels 32").model
    assert (model.ffn_hidden_size, model.num_key_value_heads, model.kv_channels) == (172, 2, 32)


def test_given_names_the_flags_of_the_user_alone():
    assert parse_args(GPT).given == {"num_layers", "hidden_size", "num_attention_heads", "seq_length", "lr"}


def test_underscores_and_dashes_are_the_same_in_names_but_not_in_values():
    config = parsed("--save_interval=5 --save some_folder --load=other_folder")
    assert (config.checkpoint.save_interval, config.checkpoint.save) == (5, "some_folder")
    assert config.checkpoint.load == "other_folder"


def test_the_last_of_repeated_flags_wins():
    assert parsed("--num-layers 3 --num-layers 4").model.num_layers == 4


def test_choices_are_read_in_any_case():
    assert parsed("--normalization RMSNorm --lr-decay-style wsd").model.normalization == "rmsnorm"
    assert parsed("--lr-decay-style wsd").optimizer.lr_decay_style == "WSD"


def test_blended_data_paths_are_kept_as_words():
    assert parsed("--data-path 0.3 a 0.7 b").data.data_path == ("0.3", "a", "0.7", "b")


def test_token_counts_may_be_written_in_scientific_form():
    assert parsed("--lr-decay-tokens 3e11").optimizer.lr_decay_tokens == 300_000_000_000
    assert parsed("--lr-decay-tokens 9007199254740993").optimizer.lr_decay_tokens == 9007199254740993


def test_lengths_and_chunks_may_be_written_in_k_and_m():
    chunk, original = "--ds-sequence-parallel-fpdt-chunk-size", "--rope-scaling-original-max-position-embeddings"
    config = parsed(f"--seq-length 256K --max-position-embeddings 1M {chunk} 64k {original} 8,192")
    model = config.model
    assert (model.seq_length, model.max_position_embeddings) == (262144, 1048576)
    assert model.rope_scaling_original_max_position_embeddings == 8192
    assert config.parallel.ds_sequence_parallel_fpdt_chunk_size == 65536
    words = "--seq-length: '128 KB' is not a number of tokens; give one, such as 131072, 128K or 1M"
    assert refusal(*GPT, "--seq-length", "128 KB").startswith(words)


@pytest.mark.parametrize("text", ["many", "1.5", "inf", "nan", "", "1e400"])
def test_a_count_that_is_no_whole_number_is_refused(text):
    assert refusal("--num-layers", text).startswith(
        f"--num-layers: {text!r} is not a whole number; give one, such as 32"
    )


@pytest.mark.parametrize("text", ["1e23", "9223372036854775808", "1" * 400])
def test_a_count_past_64_bits_is_refused(text):
    told = refusal("--seed", text)
    assert told.startswith(f"--seed: {text[:40]!r}".removesuffix("'"))
    assert "is too large; give at most 9223372036854775807" in told


def test_a_rate_that_is_no_number_is_refused():
    assert "--lr: 'fast' is not a number; give one, such as 0.1 or 3e-4" in refusal("--lr", "fast")


def test_missing_required_flags_are_named_together():
    message = refusal("--num-layers", "2", "--seq-length", "8", "--lr", "1")
    assert message == "--hidden-size, --num-attention-heads are required and not given; add them"


def test_an_unknown_flag_gets_the_closest_name():
    assert refusal(*GPT, "--num-layrs", "3").startswith("--num-layrs is not a known flag; did you mean --num-layers?")


def test_a_flag_of_another_name_elsewhere_gets_its_name_here():
    assert (
        refusal(*GPT, "--num-query-groups", "2")
        == "--num-query-groups is not a flag here; use --num-key-value-heads instead"
    )


def test_abbreviations_are_refused():
    assert "did you mean" in refusal(*GPT, "--num-layer", "3")


def test_a_stray_word_is_refused():
    assert "'stray' belongs to no flag" in refusal("stray", *GPT)


def test_a_flag_without_its_value_is_refused():
    assert refusal(*GPT, "--save").startswith("--save: expected one argument")


def test_a_parsed_configuration_cannot_be_written_to():
    with pytest.raises(FrozenInstanceError):
        parsed().model.num_layers = 3  # type: ignore[misc]


def test_the_same_field_name_is_in_one_section_only():
    names = [member.name for section in config_sections().values() for member in fields(section)]
    assert len(names) == len(set(names))


def test_every_field_has_a_description():
    for section in config_sections().values():
        descriptions = field_descriptions(section)
        assert {member.name for member in fields(section)} == set(descriptions)
        assert all(text.endswith(".") for text in descriptions.values())


def test_help_lists_every_flag_in_the_group_of_its_concern(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for section in config_sections().values():
        for member in fields(section):
            assert f"--{member.name.replace('_', '-')} " in text or f"--{member.name.replace('_', '-')}\n" in text
    assert text.index("Model architecture:") < text.index("--num-layers") < text.index("Parallelism and FPDT:")
    assert "Tokens per FPDT chunk, over all sequence-parallel ranks together." in text


@pytest.mark.parametrize("word, tokens", [("auto", 0), ("AUTO", 0), ("0", 0), ("32768", 32768)])
def test_a_chunk_may_be_left_to_the_planner(word, tokens):
    config = parse_args([*FPDT_SCRIPT.split(), "--ds-sequence-parallel-fpdt-chunk-size", word])
    assert config.parallel.ds_sequence_parallel_fpdt_chunk_size == tokens


def test_a_description_of_several_lines_is_rewrapped():
    texts = [line.strip() for line in build_parser().format_help().splitlines() if not line.lstrip().startswith("-")]
    assert not [text for text in texts if "   " in text]


def test_help_is_the_field_description_with_its_default():
    text = build_parser().format_help()
    assert "Number of transformer blocks. Required." in text
    assert "Learning rate at which the decay ends. Default: 0." in text
    assert "Default: --seq-length." in text


class TestFlashAttentionFlags:
    @pytest.mark.parametrize(
        "flags, backend",
        [
            ("--use-flash-attn", "auto"),
            ("--use-flash-attn-v2", "flash-2"),
            ("--use-flash-attn-v3", "flash-attn-3"),
            ("--use-flash-attn-v4", "flash-attn-4"),
            ("--use-flash-attn --use-flash-attn-v3", "flash-attn-3"),
            ("--use-flash-attn-v4 --attention-backend auto", "flash-attn-4"),
        ],
    )
    def test_each_names_its_backend(self, flags, backend):
        assert parsed(flags).model.attention_backend == backend

    @pytest.mark.parametrize(
        "version, backend",
        [("v2", "flash-2"), ("v2", "torch-flash"), ("v2", "flash-attn-2"), ("v3", "flash-attn-3")],
    )
    def test_agreement_with_the_named_backend_is_fine(self, version, backend):
        flags = f"--use-flash-attn-{version} --attention-backend {backend}"
        assert parsed(flags).model.attention_backend == backend

    @pytest.mark.parametrize("version, backend", [("v2", "cudnn"), ("v3", "flash-attn-2"), ("v4", "reference")])
    def test_a_version_and_another_backend_conflict(self, version, backend):
        flags = [f"--use-flash-attn-{version}", "--attention-backend", backend]
        told = f"{flags[0]} and --attention-backend {backend} ask for different attention kernels; keep one of them"
        assert refusal(*GPT, *flags) == told

    def test_two_versions_conflict(self):
        told = "--use-flash-attn-v2 and --use-flash-attn-v4 ask for different attention kernels; keep one of them"
        assert refusal(*GPT, "--use-flash-attn-v4", "--use-flash-attn-v2") == told

    @pytest.mark.parametrize("flag", ["--use-flash-attn-v1", "--use-flash-attn-triton", "--use-flash-attn-builder"])
    def test_a_kernel_that_is_not_here_leaves_the_choice_open(self, flag):
        config = parsed(f"{flag} --attention-backend reference")
        assert config.model.attention_backend == "reference"
        assert config.notes[0].startswith(f"{flag} has no effect: attention is exact with every kernel")
        assert parsed(flag).model.attention_backend == "auto"


def test_checkpoint_activations_is_the_same_as_the_deepspeed_flag():
    assert parsed("--checkpoint-activations").deepspeed.deepspeed_activation_checkpointing
    assert not parsed().deepspeed.deepspeed_activation_checkpointing
