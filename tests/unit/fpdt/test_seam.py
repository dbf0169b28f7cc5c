import gc
import weakref
from contextvars import ContextVar

import pytest
import torch

from megatron.fpdt.seam import StreamedAttention, SuspendedLayer, run_with_output
from megatron.ops.attention import AttentionVariant
from megatron.ops.linear import LinearTape

attention = StreamedAttention()
variable: ContextVar[int] = ContextVar("variable")
QKV = torch.ones(2, 1, 2, 4), torch.ones(2, 1, 2, 4)
VARIANT = AttentionVariant(0.25)


def test_a_suspended_layer_hands_out_its_call_and_finishes_with_the_output():
    def forward(x, factor):
        return x * factor + attention(*QKV, VARIANT, 0.0, None).sum()

    run = SuspendedLayer(forward, LinearTape(), torch.ones(3), 2.0)
    assert run.call.q_cBHD is QKV[0]
    assert run.call.kv_cBKD is QKV[1]
    assert run.call.variant is VARIANT
    assert run.finish(torch.tensor(5.0)).tolist() == [7.0] * 3


def state():
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        variable.get(None),
    )


@pytest.mark.parametrize("ending", ["finish", "close", "error"])
def test_a_layer_and_its_surroundings_keep_their_own_state(ending):
    """Gradient mode, autocast and context variables; two layers at once."""
    seen = []

    def forward(x, number):
        variable.set(number)
        with torch.set_grad_enabled(number == 1), torch.autocast("cpu", torch.float16, enabled=number == 2):
            before = state()
            attention(*QKV, VARIANT, 0.0, None)
            seen.append(before == state())
            if ending == "error":
                raise ValueError("in the layer")
        return x

    variable.set(0)
    with torch.no_grad():
        outside = state()
        runs = [SuspendedLayer(forward, LinearTape(), torch.ones(1), number) for number in (1, 2)]
        assert state() == outside
        for run in runs:
            if ending == "finish":
                run.finish(QKV[0])
            elif ending == "close":
                run.close()
                run.close()
            else:
                with pytest.raises(ValueError, match="in the layer"):
                    run.finish(QKV[0])
            assert state() == outside
    assert seen == ([] if ending == "close" else [True, True])


def test_a_layer_that_is_over_references_nothing():
    def forward(x):
        local = torch.ones(7)
        references.append(weakref.ref(local))
        return x + attention(*QKV, VARIANT, 0.0, None).sum() + local.sum()

    references = []
    for end in (lambda run: run.finish(QKV[0]), lambda run: run.close()):
        run = SuspendedLayer(forward, LinearTape(), torch.ones(1))
        gc.disable()
        try:
            end(run)
            del run
            assert references[-1]() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_that_does_not_call_attention_once_is_refused(times):
    def forward(x):
        for _ in range(times):
            attention(*QKV, VARIANT, 0.0, None)
        return x

    message = "has not called its attention" if times == 0 else "has called its attention twice"
    with pytest.raises(RuntimeError, match=message):
        SuspendedLayer(forward, LinearTape(), torch.ones(1)).finish(QKV[0])


def test_attention_dropout_is_refused():
    with pytest.raises(ValueError, match=r"attention dropout \(0.1\) cannot be replayed by FPDT; use 0"):
        run_with_output(lambda x: attention(*QKV, VARIANT, 0.1, None), LinearTape(), lambda call: QKV[0], torch.ones(1))
