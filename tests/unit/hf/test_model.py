"""Unmodified transformers models through the stream: loss and every gradient are transformers' own."""

from dataclasses import replace

import pytest
import torch

from megatron.config import Recompute
from megatron.core.documents import Documents
from megatron.core.parallel_state import ParallelState
from megatron.fpdt.observer import Observer
from megatron.hf import stream_model
from megatron.hf.building import build_hugging_face_model
from megatron.hf.errors import UnsupportedModelError
from megatron.hf.float64 import float64_stays
from megatron.model.builder import Execution
from tests.unit.hf.tiny_models import BATCH, LENGTH, TINY, build, eager_loss, inputs, results, worst_error
from tests.unit.model.small_model import small_config, small_inputs, small_model

PLAIN = Execution()
STREAMED = Execution(fpdt=True, chunk_size=9, slice_length=4)
OFFLOADED = Execution(fpdt=True, chunk_size=9, slice_length=4, offloading=True, recompute=Recompute.NONE)
REBUILT = Execution(fpdt=True, chunk_size=6, offloading=True, recompute=Recompute.KV, checkpoint_interval=2)
CHECKPOINTED = Execution(activation_checkpointing=True)
EXECUTIONS = {"plain": PLAIN, "streamed": STREAMED, "offloaded": OFFLOADED, "rebuilt": REBUILT}


@pytest.mark.parametrize("family", [*TINY, "llama-tied"])
def test_loss_and_gradients_are_those_of_transformers(family):
    with float64_stays():
        model = build(family).eval()
        want = results(model, eager_loss(model, *inputs()))
        for name, execution in EXECUTIONS.items():
            streamed = build_hugging_face_model(build(family).eval(), ParallelState(), execution)
            error, where = worst_error(results(streamed, streamed(*inputs())), want)
            assert error < 1e-12, (name, where)


SPANS = ((0, 5), (5, 6), (6, 20), (20, 23))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_documents_are_those_alone(family):
    starts = [[start for start, _ in SPANS]] * BATCH
    tokens, labels, mask, _ = inputs()
    positions = torch.cat([torch.arange(end - start) for start, end in SPANS]).expand(BATCH, LENGTH)
    with float64_stays():
        model = build(family)
        parts = [[t[:, slice(*span)] for t in (tokens, labels, mask, positions)] for span in SPANS]
        want = results(model, sum(eager_loss(model, *part) for part in parts))
        for name, execution in EXECUTIONS.items():
            streamed = build_hugging_face_model(build(family), ParallelState(), execution)
            loss = streamed(tokens, labels, mask, positions, Documents.from_starts(starts, LENGTH))
            error, where = worst_error(results(streamed, loss), want)
            assert error < 1e-12, (name, where)
        library = stream_model(build(family), chunk_size=7)
        loss = library(tokens, labels, mask, positions)
        error, where = worst_error(results(library, loss * mask.sum()), want)
        assert error < 1e-12, where


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS)
def test_dropout_draws_the_same_numbers_in_the_backward_pass(execution):
    model = build("gpt2", resid_pdrop=0.3, embd_pdrop=0.2).train()
    streamed = build_hugging_face_model(model, ParallelState(), execution)

    def loss_at(step):
        torch.manual_seed(5)
        with torch.no_grad():
            for p, d in zip(streamed.parameters(), directions, strict=True):
                p.add_(step * d)
        return streamed(*inputs())

    with float64_stays():
        directions = [torch.zeros_like(p) for p in streamed.parameters()]
        gradients = results(streamed, loss_at(0.0))
        directions = [torch.randn_like(p) for p in streamed.parameters()]
        up, down = float(loss_at(1e-5)), float(loss_at(-2e-5))
        slope = sum(
            float((gradients[n] * d).sum()) for (n, _), d in zip(streamed.named_parameters(), directions, strict=False)
        )
        assert (up - down) / 2e-5 == pytest.approx(slope, rel=1e-6)
        assert down != pytest.approx(float(streamed.eval()(*inputs())), rel=1e-6)


@pytest.mark.parametrize("family, draws", [("llama", False), ("phimoe", True)])
def test_random_numbers_that_no_dropout_asks_for_are_noticed(family, draws):
    model = build(family, router_jitter_noise=0.0, input_jitter_noise=0.0).train()
    streamed = build_hugging_face_model(model, ParallelState(), STREAMED)
    with float64_stays():
        streamed(*inputs()).backward()
    assert [layer.uses_dropout for layer in streamed.layers] == [draws] * 3
    assert not any(unit.uses_dropout for unit in streamed.eval().layers)


def test_attention_dropout_is_refused_with_fpdt_alone():
    with pytest.raises(UnsupportedModelError, match="attention dropout"):
        build_hugging_face_model(build("llama", attention_dropout=0.1).train(), ParallelState(), STREAMED)
    build_hugging_face_model(build("llama", attention_dropout=0.1).train(), ParallelState(), PLAIN)(*inputs())


class Notes(Observer):
    """The values that were noted, without the values."""

    def __init__(self):
        self.notes = []

    def note(self, phase, what, layer_number, chunk, value):
        self.notes.append((phase, what, layer_number, chunk))


@pytest.mark.parametrize("execution", [PLAIN, STREAMED], ids=["plain", "streamed"])
def test_an_observer_sees_what_it_sees_of_a_native_model(execution):
    native, theirs = Notes(), Notes()
    config = small_config(LENGTH, num_layers=3)
    small_model(config, replace(execution, observer=native))(*small_inputs(config)).backward()
    model = build_hugging_face_model(build("llama"), ParallelState(), replace(execution, observer=theirs))
    model(*inputs()).backward()
    assert theirs.notes == native.notes


def test_activation_checkpointing_gives_the_same_gradients():
    with float64_stays():
        want, got = (
            results(model, model(*inputs()))
            for model in (build_hugging_face_model(build("llama"), ParallelState(), e) for e in (PLAIN, CHECKPOINTED))
        )
    assert worst_error(got, want)[0] < 1e-13


def test_the_frequencies_of_rope_stay_exact_where_the_model_is_cast():
    model = build_hugging_face_model(build("llama", torch.float32), ParallelState(), PLAIN)
    frequencies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.bfloat16()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert frequencies
    assert all(torch.equal(buffer, frequencies[name]) for name, buffer in model.named_buffers())
