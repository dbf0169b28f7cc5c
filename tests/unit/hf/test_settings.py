"""What --hf-model fills in, chooses and refuses."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.arguments import parse_args
from megatron.config import Config, ConfigError, HuggingFaceModelConfig, describe_mismatch, validate
from megatron.hf.settings import read_model, transformers_config, with_hugging_face_model
from megatron.tokenizer import TokenizerError
from tests.families import FAMILIES
from tests.unit.hf.folders import LLAMA, folder_of

RUN = "--seq-length 256 --lr 1e-4 --train-iters 10 --data-path corpus --bf16"


def parsed(folder, flags="", world_size=1) -> Config:
    config = with_hugging_face_model(parse_args(f"--hf-model {folder} {RUN} {flags}".split()), world_size)
    validate(config, world_size, "cuda")
    return config


def refusal(folder, flags="", world_size=1) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(folder, flags, world_size)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.fixture
def llama(tmp_path):
    return folder_of(tmp_path / "llama", LLAMA)


def test_a_folder_and_data_make_a_run(llama):
    config = parsed(llama, world_size=8)
    model, parallel = config.model, config.parallel
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, model.num_key_value_heads) == (2, 64, 4, 2)
    assert (model.kv_channels, model.ffn_hidden_size, model.max_position_embeddings) == (32, 96, 256)
    assert (model.use_rotary_position_embeddings, model.untie_embeddings_and_output_weights) == (True, True)
    assert model.num_rows(90) == 101  # its own vocabulary, whatever the tokenizer has, and no padding
    assert (parallel.ds_sequence_parallel_fpdt, parallel.ds_sequence_parallel_fpdt_offloading) == (True, True)
    assert (parallel.ds_sequence_parallel_size, config.deepspeed.zero_stage) == (8, 3)
    assert (config.tokenizer.tokenizer_type, config.tokenizer.tokenizer_model) == ("HFTokenizer", str(llama))


def test_a_run_without_a_folder_stays_as_it_is():
    config = parse_args(f"--num-layers 2 --hidden-size 64 --num-attention-heads 8 {RUN}".split())
    assert with_hugging_face_model(config, 8) is config


@pytest.mark.parametrize(
    ("flags", "world_size", "size"),
    [
        ("", 1, 1),
        ("", 6, 2),  # of 256 tokens, 2 of the ranks' divisors take equally many
        ("--global-batch-size 4", 8, 8),
        ("--micro-batch-size 3 --global-batch-size 3", 8, 8),
        ("--ds-sequence-parallel-size 2", 8, 2),
        ("--ds-sequence-parallel-fpdt-chunk-size 36", 8, 4),
        ("--attention-dropout 0.1", 8, 4),  # ranks that share a head cannot drop the same probabilities
    ],
)
def test_as_many_ranks_share_a_sequence_as_length_batch_and_heads_allow(llama, flags, world_size, size):
    assert parsed(llama, flags, world_size).parallel.ds_sequence_parallel_size == size


def test_what_is_given_stays(llama, tmp_path):
    stated = tmp_path / "ds.json"
    stated.write_text('{"zero_optimization": {"stage": 2}}')
    assert parsed(llama, "--zero-stage 1", 2).deepspeed.zero_stage == 1
    assert parsed(llama, f"--deepspeed-config {stated}", 2).deepspeed.zero_stage == 2
    assert parsed(llama, "", 1).deepspeed.zero_stage == 0
    named = parsed(llama, "--tokenizer-type NullTokenizer --vocab-size 100")
    assert named.tokenizer.tokenizer_type == "NullTokenizer"
    assert not [note for note in named.notes if "--tokenizer-type" in note]


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["tokenizer.json", "tokenizer.model"], "HFTokenizer"),
        (["tokenizer.model"], "SentencePieceTokenizer"),
        (["vocab.json", "merges.txt"], "GPT2BPETokenizer"),
    ],
)
def test_the_tokenizer_is_the_one_in_the_folder(llama, files, kind):
    (llama / "tokenizer.json").unlink()
    for name in files:
        (llama / name).touch()
    assert parsed(llama).tokenizer.tokenizer_type == kind


def test_a_folder_without_a_tokenizer_is_refused_unless_flags_name_one(llama):
    (llama / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=rf"--hf-model \({llama}\) has no tokenizer \(tokenizer.json, .*; name a"):
        parsed(llama)
    assert parsed(llama, "--tokenizer-type NullTokenizer --vocab-size 100").tokenizer.vocab_size == 100


def test_the_log_says_what_is_read_and_chosen(llama):
    model, chosen, positions = parsed(llama, "--zero-stage 3", 4).notes[-3:]
    assert model == f"--hf-model ({llama}): llama, 2 layers, 0.1 million parameters"
    assert chosen == (
        "chosen with --hf-model: --ds-sequence-parallel-size 4 --ds-sequence-parallel-fpdt "
        f"--ds-sequence-parallel-fpdt-offloading --tokenizer-type HFTokenizer --tokenizer-model {llama}"
    )
    assert positions.startswith("--seq-length (256) exceeds max_position_embeddings (128) in config.json")
    assert "rope_theta 10000.0, rope_type default" in positions


@pytest.mark.parametrize(("model_type", "rows"), [("llama", 128), ("gptj", 256)])
def test_a_computed_table_of_positions_reaches_as_far_as_the_run(tmp_path, model_type, rows):
    """RoPE of rope_parameters has no table."""
    if not next(family for family in FAMILIES if family.model_type == model_type).is_streamed:
        pytest.skip("needs a newer transformers")
    model = parsed(folder_of(tmp_path, model_type, rotary_dim=16)).model
    assert transformers_config(model).max_position_embeddings == rows
    assert model.hf_config["max_position_embeddings" if model_type == "llama" else "n_positions"] == 128
    assert model.max_position_embeddings == 256


def test_learned_positions_end_where_they_end(tmp_path):
    folder = folder_of(tmp_path / "gpt2", "gpt2", n_layer=2, n_embd=64, n_head=4, vocab_size=101, n_positions=128)
    assert "--seq-length (256) must be at most the 128 positions that --hf-model" in refusal(folder)


def test_dropout_is_the_folders_unless_a_flag_gives_it(tmp_path):
    folder = folder_of(tmp_path / "gpt2", "gpt2", n_layer=2, n_embd=64, n_head=4, vocab_size=101, n_positions=512)
    config = parsed(folder)
    assert (config.model.attention_dropout, config.model.hidden_dropout) == (0.1, 0.1)
    assert not config.parallel.ds_sequence_parallel_fpdt
    assert config.notes[-1].startswith("without FPDT, which cannot replay the dropout of attention (0.1)")
    assert "use --attention-dropout 0" in refusal(folder, "--ds-sequence-parallel-fpdt")
    config = parsed(folder, "--attention-dropout 0 --hidden-dropout 0.2")
    assert config.parallel.ds_sequence_parallel_fpdt
    theirs = transformers_config(config.model)
    assert (theirs.attn_pdrop, theirs.resid_pdrop, theirs.embd_pdrop) == (0, 0.2, 0.2)


def test_a_configuration_survives_json(tmp_path):
    folder = folder_of(tmp_path / "gpt_oss", "gpt_oss")
    config = parsed(folder)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert isinstance(config.model, HuggingFaceModelConfig)


def test_a_run_resumes_from_a_folder_that_has_moved_or_was_saved_anew(llama, tmp_path):
    before = parsed(llama).model
    moved = llama.rename(tmp_path / "moved")
    AutoModelForCausalLM.from_config(transformers_config(before)).save_pretrained(moved)
    after = replace(parsed(moved).model, seq_length=512)
    assert describe_mismatch(before, after, change_rope=False) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, '"num_hidden_layers" is 3 in the checkpoint and 2 in --hf-model'),
        ({"rms_norm_eps": 1e-3}, '"rms_norm_eps" is 0.001 in the checkpoint'),
        ({"rope_theta": 5e5}, "add --change-rope to continue training with the RoPE of --hf-model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(llama, tmp_path, changes, words):
    other = parsed(folder_of(tmp_path / "other", LLAMA, **changes)).model
    assert words in describe_mismatch(other, parsed(llama).model, change_rope=False)
    without_rope = describe_mismatch(other, parsed(llama).model, change_rope=True)
    assert (without_rope == "") == ("rope_theta" in changes)


def test_a_checkpoint_of_a_model_of_flags_is_refused(llama):
    native = parse_args(f"--num-layers 2 --hidden-size 64 --num-attention-heads 8 {RUN}".split()).model
    message = "it has a model of flags, and this run has the llama of --hf-model"
    assert describe_mismatch(native, parsed(llama).model, change_rope=False) == message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_type": "grok-9", "auto_map": {"AutoConfig": "code.Config"}}, "the code in the folder (auto_map) is"),
        ({"model_type": "grok-9"}, "model_type 'grok-9', which the installed transformers does not have; use a model"),
        ({"model_type": "gemma3", "text_config": {}}, "only one of its parts; save its language model as a folder"),
        ({"model_type": "t5"}, "model_type 't5', which is no causal language model"),
        (
            {"model_type": "mamba", "num_hidden_layers": 1},
            "(mamba) cannot be streamed: 1 of its 1 layers carry a state",
        ),
        ({"model_type": "opt", "layerdrop": 0.1}, "it skips layers at random (layerdrop=0.1); set layerdrop to 0"),
        ({"model_type": "llama", "hidden_size": "wide"}, "describes no llama to transformers"),
        ({}, "has no model_type; name the folder of a Hugging Face model"),
        ([], "cannot be read"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_by_name(tmp_path, content, words):
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert words in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Qwen/Qwen3-8B", "--hf-model (Qwen/Qwen3-8B) is no folder, and nothing is downloaded"),
        (__file__, "is a file; name the folder that it is in"),
        ("x" * 300, "--hf-model has a name of 300 bytes"),
    ],
)
def test_what_is_no_folder_is_refused(name, words):
    assert words in refusal(name)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    assert f"--hf-model ({tmp_path}) has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-layers 2", "--num-layers (2) would describe again what config.json in --hf-model"),
        ("--swiglu --hidden-size 8", "--hidden-size (8) and --swiglu would describe again"),
        ("--max-position-embeddings 512", "remove it"),
        ("--make-vocab-size-divisible-by 1", "--make-vocab-size-divisible-by (1)"),
        ("--micro-batch-size 0", "--micro-batch-size (0) must be at least 1"),
        ("--hidden-dropout 0.1", "--hidden-dropout (0.1) has no effect on a llama, which has no such dropout"),
    ],
)
def test_flags_that_contradict_the_folder_are_refused(llama, flags, words):
    assert words in refusal(llama, flags)


def test_what_a_user_must_give_is_named(llama):
    with pytest.raises(ConfigError, match="--seq-length, --lr are required and not given; add them"):
        parse_args(["--hf-model", str(llama)])


def test_code_of_the_folder_is_not_needed_for_a_model_that_transformers_has(llama):
    file = llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoConfig": "code.Config"}}))
    assert parsed(llama).model.num_layers == 2


def test_the_model_of_the_settings_is_the_folders(llama):
    model = read_model(llama, parsed(llama).model)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(transformers_config(model))
    assert model.sizes.all_block_weights == sum(
        parameter.numel() for parameter in theirs.model.layers.parameters() if parameter.ndim > 1
    )
