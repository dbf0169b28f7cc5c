"""FPDT, chunks, offloading and sequence parallelism are ways of executing: parameters are the same, bit for bit."""

from dataclasses import replace

import pytest
import torch

from tests.distributed.model_case import PADDED_VOCAB_SIZE, Case, build, model_config
from tests.distributed.rank_pool import RankPool
from tests.reference.reference_model import OUTPUT_LAYER, WORD_EMBEDDINGS, State, parameter_shapes

MODELS = {
    "llama": Case(family="llama", num_key_value_heads=2),
    "gpt": Case(family="gpt", positions="learned"),
    "gpt with rotary positions": Case(family="gpt", positions=0.25),
}
EXECUTIONS = [
    {},
    {"sequence_parallel_size": 2},
    {"chunk_length": 16},
    {"chunk_length": 24, "offloading": True},
    {"chunk_length": 20, "offloading": True, "sequence_parallel_size": 4},
    {"chunk_length": 16, "data_parallel_size": 2, "sequence_parallel_size": 2},
]


def initial_state(case: Case) -> State:
    return {name: tensor.detach().clone() for name, tensor in build(case)[0].state_dict().items()}


def parameter_names_and_tying(case: Case) -> tuple[list[str], bool]:
    model = build(case)[0]
    state = model.state_dict(keep_vars=True)
    return [name for name, _ in model.named_parameters()], state[OUTPUT_LAYER] is state[WORD_EMBEDDINGS]


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_the_documented_ones(ranks: RankPool, name: str) -> None:
    state = ranks.run(initial_state, MODELS[name], num_ranks=1)[0]
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert shapes == parameter_shapes(model_config(MODELS[name]), PADDED_VOCAB_SIZE)


@pytest.mark.parametrize("name", MODELS)
def test_every_execution_on_every_rank_starts_from_the_same_weights(ranks: RankPool, name: str) -> None:
    want = ranks.run(initial_state, MODELS[name], num_ranks=1)[0]
    for execution in EXECUTIONS:
        case = replace(MODELS[name], **execution)
        for rank, state in enumerate(ranks.run(initial_state, case, num_ranks=case.num_ranks)):
            assert list(state) == list(want), f"{case} rank {rank}: other names or order"
            differing = [key for key in want if not torch.equal(state[key], want[key])]
            assert not differing, f"{case} rank {rank}: {differing}"


@pytest.mark.parametrize("chunk_length", [0, 16])
def test_tied_output_layer_is_the_word_embeddings_themselves(ranks: RankPool, chunk_length: int) -> None:
    case = replace(MODELS["gpt"], chunk_length=chunk_length)
    names, tied = ranks.run(parameter_names_and_tying, case, num_ranks=1)[0]
    assert tied
    assert WORD_EMBEDDINGS in names
    assert OUTPUT_LAYER not in names
    assert not ranks.run(parameter_names_and_tying, MODELS["llama"], num_ranks=1)[0][1]
