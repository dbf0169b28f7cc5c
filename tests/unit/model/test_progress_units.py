"""The training loop announces how many pieces of work a step has; the model reports as many."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron.config import DeepSpeedConfig, ParallelConfig, Recompute
from megatron.model.builder import Execution
from megatron.training.run import step_units
from tests.unit.model.small_model import ON_DEVICE, PLAIN, Reports, small_config, small_inputs, small_model


def announced(config, execution, stream, num_microbatches):
    parallel = ParallelConfig(ds_sequence_parallel_fpdt=execution.fpdt)
    deepspeed = DeepSpeedConfig(deepspeed_activation_checkpointing=execution.activation_checkpointing)
    settings = SimpleNamespace(model=config, parallel=parallel, deepspeed=deepspeed)
    return step_units(settings, stream.layout_of(config.seq_length), num_microbatches)


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
def test_a_step_reports_as_many_units_as_the_training_loop_announces(execution, num_microbatches):
    reports = Reports()
    config = small_config(seq_length=40)
    model = small_model(config, replace(execution, observer=reports))
    for _ in range(num_microbatches):
        model(*small_inputs(config)).backward()
    assert len(reports.chunks) == announced(config, execution, model.execution.stream, num_microbatches)
