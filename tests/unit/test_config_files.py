"""Files of flags: from YAML to Config, and back."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron.arguments import expand_files, parse_args
from megatron.config import Config, ConfigError
from megatron.config.settings_file import settings_lines, settings_text
from tests.unit.config.commands import RUNNABLE, parsed
from tests.unit.test_arguments import FPDT_SCRIPT

RUN = """
# a small GPT
num-layers: 2
hidden_size: 64
num_attention_heads: 8
model:
  seq-length: 1K
optimizer: {lr: 1e-4}
data_path: some_text_document
tokenizer_type: NullTokenizer
vocab_size: 1_00
train_iters: 10
"""


@pytest.fixture
def write(tmp_path: Path):
    def file(text: str, name: str = "run.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return file


def refusal(file: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_args(["--config", file])
    return str(caught.value)


def without_notes_of_flags(config: Config) -> Config:
    return replace(config, notes=tuple(note for note in config.notes if " has no effect: " not in note))


def test_a_file_is_the_same_as_its_flags(write):
    assert parse_args(["--config", write(RUN)]) == parsed()


def test_a_value_is_read_as_its_flag_reads_it(write):
    """And not as YAML 1.1 does, for which these are a number of 60ths, octal, false, a string and a date."""
    values = 'split: 8:1:1\nseed: 010\nprogress: off\nmin_lr: 1e-6\nsave: 2026-01-02\nwandb_project: "#1: no"\n'
    flags = ["--split=8:1:1", "--seed=10", "--progress=off", "--min-lr=1e-6", "--save=2026-01-02"]
    assert parse_args(["--config", write(RUN + values)]) == parse_args([*RUNNABLE, *flags, "--wandb-project=#1: no"])


def test_lists_and_switches_are_those_of_yaml(write):
    values = "train_data_path: [0.3, A, 0.7, B b]\nprofile_ranks:\n- 0\n- 1\n"
    values += "bf16: true\nswiglu: False\nno_query-key_layer-scaling: on"
    config = parse_args(["--config", write(RUN.replace("data_path: some_text_document", values))])
    assert config.data.train_data_path == ("0.3", "A", "0.7", "B b")
    assert config.logging.profile_ranks == (0, 1)
    assert (config.precision.bf16, config.model.swiglu) == (True, False)
    assert {"bf16"} == {"bf16", "swiglu"} & config.given
    assert config.notes[0].startswith("--no-query-key-layer-scaling has no effect")


def test_the_command_line_wins_and_later_files_over_earlier_ones(write):
    base = write(RUN + "bf16: true\nprofile_ranks: [0, 1]\n")
    mine = write("hidden_size: 128\nswiglu: true\nbf16: off\n", "mine.yaml")
    config = parse_args(["--num-layers", "5", "--config", base, mine, "--swiglu=false", "--profile-ranks", "3"])
    assert (config.model.num_layers, config.model.hidden_size) == (5, 128)
    assert (config.precision.bf16, config.model.swiglu, config.logging.profile_ranks) == (False, False, (3,))
    assert not {"bf16", "swiglu", "config"} & config.given
    assert parse_args(["--config", base, "--num-layers=5", "--config", mine]).model.hidden_size == 128
    words = expand_files(["--config", mine, "--lr", "1"])
    assert words == ["--hidden-size=128", "--swiglu=true", "--bf16=off", "--config", mine, "--lr", "1"]


@pytest.mark.parametrize("switched", [True, False])
def test_a_switch_may_be_reset_on_the_command_line(switched):
    flags = "--swiglu --bf16=true --swiglu=false" + " --swiglu" * switched
    config = parsed(flags)
    assert config.model.swiglu == switched
    assert ("swiglu" in config.given, "bf16" in config.given) == (switched, True)
    with pytest.raises(ConfigError, match="--swiglu is a switch, and 'maybe' is given; use true or false"):
        parsed("--swiglu=maybe")


@pytest.mark.parametrize(
    "text, line, words",
    [
        ("num_layrs: 3", 1, "--num-layrs is not a known flag; did you mean --num-layers?"),
        ("\nmodel:\n  lr:\n    x: 3", 3, "lr is below two headings; use at most one"),
        ("confg: a.yaml", 1, "--confg is not a known flag; did you mean --config?"),
        ("num_query_groups: 3", 1, "--num-query-groups is not a flag here; use --num-key-value-heads instead"),
        ("random_ltd: true", 1, "--random-ltd cannot be honored: no tokens are dropped here"),
        ("help: true", 1, "--help is not a known flag; remove it"),
        ("config: other.yaml", 1, "--config is not a known flag; remove it"),
        ("--seed: 1", 1, "----seed is not a known flag"),
        ("\nseed: many", 2, "--seed: 'many' is not a whole number"),
        ("seed: true", 1, "--seed: 'true' is not a whole number"),
        ("seed: [1, 2]", 1, "--seed takes one value, and a list is given"),
        ("bf16: 1", 1, "--bf16 is a switch, and '1' is given; use true or false"),
        ("bf16: [true]", 1, "--bf16 takes one value, and a list is given"),
        ("normalization: batchnorm", 1, "--normalization: 'batchnorm' is not known; use one of layernorm, rmsnorm"),
        ("data-impl: cached", 1, "--data-impl: 'cached' is not known; use one of mmap, infer"),
        ("seed:", 1, "seed has no value; give one, or remove the line for the default"),
        ("seed: null", 1, "seed has no value"),
        ("data_path: []", 1, "the list of data_path must hold words or numbers; give at least one"),
        ("data_path: [[a], b]", 1, "the list of data_path must hold words or numbers"),
        ("profile_ranks: [0, x]", 1, "--profile-ranks: 'x' is not a whole number"),
        ("seed: 1\nlr: 2\nseed: 1", 3, "seed is set in line 1, too; keep one of them"),
        ("micro-batch-size: 1\nmicro_batch_size: 1", 2, "micro_batch_size is set in line 1 as micro-batch-size, too"),
        ("training:\n  seed: 1\nseed: 1", 3, "seed is set in line 2, too"),
        ("encoder_seq_length: 8\nseq_length: 8", 2, "seq_length is set in line 1 as encoder_seq_length, too"),
        ("- seed: 1", 1, "there are no settings here; write NAME: VALUE lines"),
        ("[1]: 2", 1, "a key must be the name of a flag"),
        ("seed: 1\nlr: 2: 3", 2, "this is not valid YAML (mapping values are not allowed here)"),
        ("seed: 1\n---\nseed: 2", 2, "this is not valid YAML (but found another document)"),
        ("seed: *x", 1, "this is not valid YAML (found undefined alias 'x')"),
        ("a: &a\n  b: *a", 2, "b is below two headings"),
    ],
)  # fmt: skip
def test_a_faulty_setting_is_refused_by_its_line(write, text, line, words):
    file = write(text)
    message = refusal(file)
    assert message.startswith(f"{file}:{line}: {words}")
    assert len(message.splitlines()) == 1


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    missing, latin = tmp_path / "run.yaml", tmp_path / "latin.yaml"
    assert refusal(str(missing)) == f"--config ({missing}): No such file or directory; name a YAML file of flags"
    assert "Is a directory" in refusal(str(tmp_path))
    latin.write_bytes(b"save: \xe9\n")
    assert refusal(str(latin)).startswith(f"{latin}: this is not valid YAML ('utf-8' codec")
    latin.write_text("seed: " + "[" * 10_000)
    assert "this is not valid YAML" in refusal(str(latin))
    latin.write_text("")
    assert refusal(str(latin)).startswith("--num-layers, ")


def test_megatron_s_flag_for_a_file_names_the_one_here():
    with pytest.raises(ConfigError, match="--yaml-cfg is not a flag here; use --config instead"):
        parsed("--yaml-cfg x.yaml")


CONFIGURATIONS = [
    FPDT_SCRIPT,
    " ".join(RUNNABLE),
    f"{' '.join(RUNNABLE)} --ds-sequence-parallel-fpdt --ds-sequence-parallel-fpdt-offloading "
    "--ds-sequence-parallel-fpdt-chunk-size auto --ds-sequence-parallel-fpdt-device-memory auto "
    "--ds-sequence-parallel-fpdt-recompute mlp --adam-eps 1e-12 --use-flash-attn-v2 --load-tag global_step7 --load x "
    "--profile --profile-steps 2,3 --kv-channels 16 --wandb-project yes --wandb-exp-name 10 --save ~ --lr 1.2e-05",
    f"{' '.join(RUNNABLE)} --ds-sequence-parallel-fpdt --ds-sequence-parallel-fpdt-offloading "
    "--ds-sequence-parallel-fpdt-disk /nvme0,/nvme1 --ds-sequence-parallel-fpdt-disk-memory 1.5",
]  # fmt: skip


@pytest.mark.parametrize("flags", CONFIGURATIONS)
def test_a_configuration_that_is_written_and_given_back_is_the_same(write, flags):
    config = parse_args(flags.split())
    again = parse_args(["--config", write(settings_text(config))])
    assert again.given == config.given - {"local_rank"}
    rank = replace(again.parallel, local_rank=config.parallel.local_rank)
    assert replace(again, given=config.given, parallel=rank) == without_notes_of_flags(config)
    assert parse_args(["--config", write("\n".join(settings_lines(config)))]) == again


def test_a_written_file_has_the_names_of_the_flags_and_lengths_in_k_and_m():
    text = settings_text(parse_args(FPDT_SCRIPT.split()))
    assert "model:\n  num_layers: 32\n  hidden_size: 4096\n" in text
    assert "  seq_length: 256K\n" in text
    assert "  ds_sequence_parallel_fpdt_chunk_size: 64K\n" in text
    assert "local_rank" not in text


def test_non_ascii_paths_and_odd_words_are_given_back(write):
    paths = ("--train-data-path", "données/a b", "--valid-data-path", "- x", "#", "--test-data-path", "a: b\nc", "")
    config = parse_args([*RUNNABLE[:10], *paths])
    assert parse_args(["--config", write(settings_text(config))]) == config
