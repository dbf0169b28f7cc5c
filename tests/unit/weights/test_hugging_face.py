"""Converted transformers models: a bit-exact round trip, equal logits, loss, gradients and greedy tokens."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megatron.model.builder import Execution
from megatron.weights.hugging_face import Settings, from_hugging_face, to_hugging_face
from megatron.weights.parameters import parameter_shapes
from megatron.weights.safetensors_folder import INDEX_FILE, SafetensorsFolder
from tests.unit.weights.small_families import CASES, VOCAB, in_their_names, load_here, our_logits, read_portable, save

SETTINGS = Settings()
LENGTH = 37
EXECUTIONS = {
    "plain": Execution(),
    "fpdt": Execution(fpdt=True, chunk_size=10),
    "fpdt-offloading": Execution(fpdt=True, chunk_size=16, offloading=True),
}
TOLERANCE = 2e-5  # relative; fp32 through two blocks in another order of additions


def export(folder: Path, out: Path, **options) -> None:
    portable, weights = read_portable(folder)
    to_hugging_face(weights, portable, out, SETTINGS, **options)


def tokens_and_labels():
    tokens = torch.randint(0, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(9))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def their_loss_and_gradients(model):
    tokens, labels = tokens_and_labels()
    logits = model(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    return logits.detach(), loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def relative_error(got, want):
    assert got.shape == want.shape
    return float((got - want).norm() / want.norm())


def assert_same_tensors(got: SafetensorsFolder, want: SafetensorsFolder) -> None:
    assert got.names == want.names
    for name in want.names:
        assert got.dtype(name) == want.dtype(name)
        assert torch.equal(got.get(name), want.get(name)), name


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """(model of transformers, folder it is saved in, folder of its portable weights)"""
    model = save(request.param, tmp_path / "theirs")
    from_hugging_face(tmp_path / "theirs", tmp_path / "ours", SETTINGS)
    return model, tmp_path / "theirs", tmp_path / "ours"


def test_a_round_trip_is_bit_exact(case, tmp_path):
    _, theirs, ours = case
    export(ours, tmp_path / "back")
    assert_same_tensors(SafetensorsFolder(tmp_path / "back"), SafetensorsFolder(theirs))


def test_the_weights_are_those_of_the_model(case):
    _, _, ours = case
    portable, weights = read_portable(ours)
    shapes = parameter_shapes(portable.model, portable.padded_vocab_size)
    assert {name: weights.shape(name) for name in weights.names} == shapes


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS)
def test_logits_loss_and_all_gradients_are_those_of_transformers(case, execution):
    theirs, _, folder = case
    want_logits, want_loss, want_gradients = their_loss_and_gradients(theirs)
    ours = load_here(folder, execution, LENGTH)
    tokens, labels = tokens_and_labels()
    assert relative_error(our_logits(ours, tokens), want_logits) < TOLERANCE
    loss = ours(tokens, labels, torch.ones(tokens.shape), torch.arange(LENGTH).expand(tokens.shape))
    loss.backward()
    assert abs(float(loss.detach()) / float(want_loss) - 1) < TOLERANCE
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    got = in_their_names(gradients, read_portable(folder)[0])
    assert got.keys() == want_gradients.keys()
    errors = {name: relative_error(got[name], want) for name, want in want_gradients.items()}
    assert not {name: error for name, error in errors.items() if error > TOLERANCE}


def test_transformers_loads_the_export_and_generates_the_same_tokens(case, tmp_path):
    theirs, _, ours = case
    export(ours, tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(theirs)
    assert back.dtype == torch.float32
    prompt = tokens_and_labels()[0][:, :8]
    greedy = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(back.generate(prompt, **greedy), theirs.generate(prompt, **greedy))


def test_a_padded_vocabulary_keeps_the_logits_and_bounds_the_loss(case, tmp_path):
    model, theirs, unpadded = case
    portable = from_hugging_face(theirs, tmp_path / "padded", SETTINGS, make_vocab_size_divisible_by=64)
    assert (portable.vocab_size, portable.padded_vocab_size) == (VOCAB, 64)
    tokens, labels = tokens_and_labels()
    logits = our_logits(load_here(tmp_path / "padded", Execution(), LENGTH), tokens)
    assert torch.equal(logits[..., :VOCAB], our_logits(load_here(unpadded, Execution(), LENGTH), tokens))
    loss, padded = (F.cross_entropy(z.flatten(0, 1), labels.flatten()) for z in (logits[..., :VOCAB], logits))
    assert 0 < padded - loss <= torch.log(torch.tensor(64 / VOCAB))
    export(tmp_path / "padded", tmp_path / "back")
    assert_same_tensors(SafetensorsFolder(tmp_path / "back"), SafetensorsFolder(theirs))
    assert model.config.vocab_size == json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"]


def test_shards_in_and_shards_out(case, tmp_path):
    theirs, _, ours = case
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="9KB")
    assert (tmp_path / "sharded" / INDEX_FILE).is_file()
    lines: list[str] = []
    settings = Settings(max_shard_bytes=9000, report=lines.append)
    from_hugging_face(tmp_path / "sharded", tmp_path / "again", settings)
    assert len(lines) == len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert_same_tensors(SafetensorsFolder(tmp_path / "again"), SafetensorsFolder(ours))
    portable, _ = read_portable(ours)
    to_hugging_face(SafetensorsFolder(tmp_path / "again"), portable, tmp_path / "back", settings)
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert_same_tensors(SafetensorsFolder(tmp_path / "back"), SafetensorsFolder(tmp_path / "sharded"))
