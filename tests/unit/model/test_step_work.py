"""The training loop announces the work of a step; the chunks that the model reports add up to it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron.config import DeepSpeedConfig, ParallelConfig, Recompute
from megatron.core.sequence_layout import SequenceLayout
from megatron.model.builder import Execution
from megatron.planner.flops import forward_flops
from megatron.training.run import forward_work, step_work
from tests.unit.model.small_model import ON_DEVICE, PLAIN, Reports, small_config, small_inputs, small_model


def announced(config, execution, stream, num_microbatches):
    parallel = ParallelConfig(ds_sequence_parallel_fpdt=execution.fpdt)
    deepspeed = DeepSpeedConfig(deepspeed_activation_checkpointing=execution.activation_checkpointing)
    settings = SimpleNamespace(model=config, parallel=parallel, deepspeed=deepspeed)
    return step_work(settings, stream, stream.layout_of(config.seq_length), num_microbatches)


@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize(
    "execution",
    [
        pytest.param(PLAIN, id="plain"),
        pytest.param(Execution(activation_checkpointing=True), id="recompute"),
        pytest.param(ON_DEVICE, id="three chunks"),
        pytest.param(replace(ON_DEVICE, chunk_size=20), id="two chunks"),
        pytest.param(replace(ON_DEVICE, chunk_size=65536, offloading=True), id="one chunk"),
        pytest.param(replace(ON_DEVICE, recompute=Recompute.ATTENTION, checkpoint_interval=2), id="attention"),
    ],
)
def test_the_chunks_of_a_step_add_up_to_the_work_that_the_training_loop_announces(execution, num_microbatches):
    reports = Reports()
    config = small_config(seq_length=40)
    model = small_model(config, replace(execution, observer=reports))
    for _ in range(num_microbatches):
        model(*small_inputs(config)).backward()
    work = announced(config, execution, model.execution.stream, num_microbatches)
    reported = [work.of(phase, chunk) for phase, _, chunk in reports.chunks]
    assert sum(reported) == pytest.approx(work.total)
    kinds = {("backward" if phase == "backward" else "forward", chunk) for phase, _, chunk in reports.chunks}
    assert len(set(reported)) == len(kinds)


@pytest.mark.parametrize("attention_share, pairs", [(1.0, [16, 48, 80, 112, 68]), (1 - 0.5**2, [16, 48, 71, 72, 36])])
def test_attention_grows_with_the_keys_of_a_chunk_up_to_the_window(attention_share, pairs):
    """Twice the pairs of queries and keys of chunks of four tokens, the last of two: causal, and in a window of 9."""
    config = small_config(seq_length=18)
    work = forward_work(SimpleNamespace(model=config), SequenceLayout(18, 4), 1, attention_share)
    flops = forward_flops(config, 0, 18, attention_share)
    chunks = zip(pairs, [4, 4, 4, 4, 2], strict=True)
    expected = [flops.attention * p / sum(pairs) + flops.token_wise * tokens / 18 for p, tokens in chunks]
    assert work.forward == pytest.approx([each / config.num_layers for each in expected])
