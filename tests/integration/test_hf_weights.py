"""Training that begins with the weights of a Hugging Face folder, and ends with such a folder."""

from pathlib import Path

import pytest
import torch

from megatron.arguments import parse_args
from megatron.weights.safetensors_folder import SafetensorsFolder
from tests.integration.corpus import VOCAB_SIZE
from tests.integration.runs import OFFLOADED, SEQ_LENGTH, TOKENIZER, TRAINING, ranks, train
from tests.integration.transformers_training import batches_of, losses_of_transformers
from tests.unit.hf.published_models import loaded, tiny_model
from tests.unit.tools.tool import run_tool

TOOL = "hf2megads_weight_converter"


def flags_of(folder: Path, corpus: Path, num_iters: int) -> list[str]:
    return ["--hf-model", str(folder), *settings_of(corpus, num_iters)]


def settings_of(corpus: Path, num_iters: int) -> list[str]:
    data = ["--data-path", str(corpus), "--split", "90,6,4", "--seq-length", str(SEQ_LENGTH)]
    return [*TOKENIZER, *TRAINING, *data, "--train-iters", str(num_iters), "--lr-decay-style", "constant"]


def their_losses(flags: list[str]) -> list[float]:
    """The losses of a run by transformers and AdamW alone."""
    config = parse_args(flags)
    assert config.optimizer.lr is not None
    return losses_of_transformers(Path(config.model.hf_model or ""), batches_of(config), config.optimizer.lr)


@pytest.mark.parametrize("family, zero_stage", [("qwen3_moe", 3), ("deepseek_v3", 1)])
def test_a_run_begins_with_a_folder_and_ends_with_one(
    family: str, zero_stage: int, corpus: Path, tmp_path: Path
) -> None:
    tiny_model(family, vocab_size=VOCAB_SIZE + 1).save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "tokenizer.json").write_text("{}")
    out = [*("--save", str(tmp_path / "saved")), *("--save-hf", str(tmp_path / "end")), "--zero-stage", str(zero_stage)]
    flags = flags_of(tmp_path / "start", corpus, 3)
    first = train([*flags, *out], tmp_path / "first", num_ranks=2)
    assert list(first.losses.values()) == pytest.approx(their_losses(flags), rel=1e-5)
    assert f"loaded the weights of {tmp_path / 'start'}" in first.output
    assert run_tool(TOOL, "to-hf", tmp_path / "saved", tmp_path / "converted") == 0
    start, end, converted = (SafetensorsFolder(tmp_path / name) for name in ("start", "end", "converted"))
    assert start.names == end.names == converted.names
    assert all(torch.equal(end.get(name), converted.get(name)) for name in end.names)
    assert not torch.equal(end.get("model.norm.weight"), start.get("model.norm.weight"))
    assert (tmp_path / "end" / "tokenizer.json").is_file()
    loaded(tmp_path / "end")

    from_end = train(flags_of(tmp_path / "end", corpus, 1), tmp_path / "second", num_ranks=2)
    again = ["--load", str(tmp_path / "saved"), "--finetune"]
    from_checkpoint = train([*flags_of(tmp_path / "start", corpus, 1), *again], tmp_path / "third", num_ranks=2)
    assert from_end.losses == from_checkpoint.losses


def test_a_llama_learns_as_the_native_model_does_and_generates_as_in_transformers(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, native, end = (tmp_path / name for name in ("start", "native", "end"))
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    tiny_model("llama", vocab_size=VOCAB_SIZE + 1, **ids).save_pretrained(start)
    flags = flags_of(start, corpus, 3)
    run = train([*flags, "--save-hf", str(end)], tmp_path / "first", num_ranks=2)
    assert run_tool(TOOL, "to-megatron", start, native) == 0
    of_native = [*capsys.readouterr().out.splitlines()[-1].split(), *OFFLOADED, *ranks(2, 3)]
    second = train([*settings_of(corpus, 3), *of_native], tmp_path / "second", num_ranks=2)
    assert second.losses == pytest.approx(run.losses, rel=1e-5)
    assert list(run.losses.values()) == pytest.approx(their_losses(flags), rel=1e-5)

    prompt = ["--prompt", "1 2 3", "--greedy", "--max-new-tokens", "12", "--sample-output-file", str(tmp_path / "text")]
    assert run_tool("generate_samples_gpt", "--load", end, *TOKENIZER, *prompt) == 0
    theirs = loaded(end).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=12, do_sample=False)[0]
    assert (tmp_path / "text").read_text().split() == [str(token) for token in theirs.tolist()]


def test_a_folder_without_weights_gives_an_untrained_model(corpus: Path, tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=VOCAB_SIZE + 1).config.save_pretrained(tmp_path / "start")
    run = train([*flags_of(tmp_path / "start", corpus, 1), "--save-hf", str(tmp_path / "end")], tmp_path / "events")
    assert f"{tmp_path / 'start'} has no weights: training starts from random ones" in run.output
    loaded(tmp_path / "end")
    with pytest.raises(AssertionError, match=rf"--save-hf \({tmp_path / 'end'}\) exists and is not an empty folder"):
        train([*flags_of(tmp_path / "start", corpus, 1), "--save-hf", str(tmp_path / "end")], tmp_path / "events")
