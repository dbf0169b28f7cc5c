"""Every flag of Megatron-DeepSpeed: honored, accepted with a note, or refused with a reason and advice."""

from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

from megatron.arguments import FILES, parse_args
from megatron.config import ConfigError, config_sections
from megatron.config.unknown_flags import is_misspelling
from megatron.config.upstream_flags import ACCEPTED, ALIASES, OTHER_NAMES, REFUSED
from tests.unit.config.commands import GPT, complaint, parsed

# NAME is a switch, NAME=VALUE takes that one among others, and NAME= any number or word.
UPSTREAM = Path(__file__).with_name("upstream_flags.txt").read_text().split()
OWN = [member.name.replace("_", "-") for section in config_sections().values() for member in fields(section)]
NAMES_HERE = {*OWN, *(flag.name for flag in ACCEPTED)}


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_args([*GPT, *words])
    return str(caught.value)


@pytest.mark.parametrize("entry", UPSTREAM)
def test_every_flag_of_megatron_deepspeed_has_an_outcome(entry: str) -> None:
    name, takes_value, value = entry.partition("=")
    words = [f"--{name}", *([value or "1"] if takes_value else [])]
    own_name = name.replace("_", "-")
    if own_name in OTHER_NAMES or own_name in {flag.name for flag in REFUSED}:
        told = refusal(*words)
        assert told.startswith((f"--{own_name} cannot be honored: ", f"--{own_name} is not a flag here; "))
    elif name.replace("_", "-") in ("deepspeed-config", "deepscale-config"):
        assert refusal(*words).startswith("--deepspeed-config (1) cannot be read")
    else:
        notes = parse_args([*GPT, *words]).notes
        noted = any(flag.name == own_name for flag in ACCEPTED)
        assert any(note.startswith(f"--{own_name} has no effect: ") for note in notes) == noted


def test_a_flag_has_one_outcome() -> None:
    outcomes = [*NAMES_HERE, *OTHER_NAMES, *ALIASES, *(flag.name for flag in REFUSED)]
    assert not [name for name, count in Counter(outcomes).items() if count > 1]
    assert {*OTHER_NAMES.values(), *ALIASES.values()} <= {*OWN, FILES}


def test_a_flag_that_a_refusal_names_is_known() -> None:
    advice = " ".join([*(flag.advice for flag in REFUSED), *(f"{flag.otherwise} {flag.why}" for flag in ACCEPTED)])
    named = {word.strip(",.;").removeprefix("--") for word in advice.split() if word.startswith("--")}
    assert named <= NAMES_HERE


@pytest.mark.parametrize(
    "words, told",
    [
        ("--optimizer sgd", "--optimizer: 'sgd' is not honored; there is no other optimizer; remove --optimizer"),
        (
            "--num-experts 8",
            "'8' is not honored; there is no mixture of experts here; use --num-experts 1 for the dense",
        ),
        ("--remote-device nvme", '"zero_optimization": {"offload_param": {"device": "cpu"}}'),
        ("--sample-rate 0.5", "all samples are used here; use --sample-rate 1"),
        ("--DDP-impl FSDP", "'FSDP' is not known; use one of local, torch"),
    ],
)
def test_a_value_with_another_meaning_is_refused(words: str, told: str) -> None:
    assert told in refusal(*words.split())


class TestSpellings:
    def test_an_alias_is_the_flag_itself(self) -> None:
        assert parsed("--encoder-num-layers 3 --encoder_seq_length=512 --deepscale").given >= {
            "num_layers",
            "deepspeed",
        }
        assert parsed("--encoder-num-layers 3").model.num_layers == 3

    def test_a_load_tag_names_the_step(self) -> None:
        assert parsed("--load x --load-tag global_step40").checkpoint.ckpt_step == 40
        assert "--load-tag (best) must be the name of a checkpoint, such as global_step100" in refusal(
            "--load-tag", "best"
        )
        told = refusal("--load-tag", "global_step40", "--ckpt-step", "40")
        assert told == "--load-tag (global_step40) and --ckpt-step (40) set the same thing; keep one of them"
        assert complaint("--load-tag global_step4").startswith("--load-tag (global_step4) has no effect without --load")

    def test_profile_takes_the_kind_or_none(self) -> None:
        assert parsed("--profile").logging.profile == "pt"
        assert parsed("--profile pt-full --profile-ranks 0").logging.profile == "pt-full"
        assert "'hltv' is not known; use one of pt, pt-full" in refusal("--profile", "hltv")
        assert parsed().logging.profile is None

    def test_profile_steps_are_the_first_and_the_last(self) -> None:
        logging = parsed("--profile --profile-steps 2,3").logging
        assert (logging.profile_step_start, logging.profile_step_end) == (1, 3)
        for steps in ("3,2", "0,4", "2", "a,b"):
            assert f"--profile-steps ({steps}) must be the first and the last" in refusal("--profile-steps", steps)

    def test_full_granularity_is_activation_checkpointing(self) -> None:
        assert parsed("--recompute-granularity full").deepspeed.deepspeed_activation_checkpointing
        assert not parsed("--recompute-granularity selective").deepspeed.deepspeed_activation_checkpointing


class TestFlagsThatCountForNothing:
    def test_a_loss_scale_with_bf16_is_noted(self) -> None:
        config = parsed("--bf16 --loss-scale 12 --hysteresis 2")
        assert config.notes == (
            "--loss-scale (12) has no effect with --bf16, which needs no loss scale",
            "--hysteresis (2) has no effect with --bf16, which needs no loss scale",
        )
        assert complaint("--bf16 --loss-scale 12 --hysteresis 2") == ""

    def test_a_save_interval_without_a_folder_is_noted(self) -> None:
        note = "--save-interval (5) has no effect without --save: nothing will be saved"
        assert parsed("--save-interval 5").notes == (note,)
        assert parsed("--save-interval 5 --save x").notes == ()

    def test_positions_may_be_left_to_rope_alone(self) -> None:
        assert complaint("--no-position-embedding --use-rotary-position-embeddings") == ""
        assert "leave the model without positions; add --use-rotary" in complaint("--no-position-embedding")

    def test_a_missing_checkpoint_is_no_error_where_a_run_starts(self) -> None:
        assert complaint("--load x --exit-on-missing-checkpoint --save y") == ""
        assert "cannot be honored where --load (x) is --save" in complaint(
            "--load x --exit-on-missing-checkpoint --save x"
        )


class TestSuggestions:
    @pytest.mark.parametrize(
        "slip, meant",
        [("num-layrs", "num-layers"), ("num-layer", "num-layers"), ("lr-decay-iter", "lr-decay-iters")],
    )
    def test_a_slip_of_a_letter_is_corrected(self, slip: str, meant: str) -> None:
        assert f"did you mean --{meant}?" in refusal(f"--{slip}", "3")

    @pytest.mark.parametrize(
        "one, other",
        [
            ("no-save-optim", "no-load-optim"), ("log-optimizer-states-to-tensorboard", "log-timers-to-tensorboard"),
            ("adam-beta3", "adam-beta1"), ("max-lr", "min-lr"), ("use-flash-attn-v5", "use-flash-attn-v4"),
            ("eval-interval", "save-interval"), ("load-interval", "log-interval"), ("train-steps", "train-iters"),
            ("fp8", "fp16"), ("valid-data-path", "train-data-path"), ("log-throughput", "log-interval"),
        ],
    )  # fmt: skip
    def test_a_flag_of_another_meaning_is_not_suggested(self, one: str, other: str) -> None:
        assert not is_misspelling(one, other)
        assert other in NAMES_HERE

    def test_no_flag_of_megatron_deepspeed_is_taken_for_another(self) -> None:
        names = {entry.partition("=")[0].replace("_", "-") for entry in UPSTREAM}
        slips = {(a, b) for a in names for b in NAMES_HERE if a != b and is_misspelling(a, b)}
        assert slips == set()
