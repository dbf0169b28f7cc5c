"""Numbers that are none, or out of range, are refused by the tools with the flag's name, before anything is read."""

import pytest

from tests.unit.tools.tool import run_tool

FPDT = "--ds-sequence-parallel-fpdt"
GENERATE = ("generate_samples_gpt", "--load", "x", "--prompt", "1")
NEEDLE = ("eval_long_context", "needle", "--load", "x", "--output-dir", "y")
PLAN = ("plan_context", "--model", "llama-8b")
PLAN_FLAGS = ("--link", "--network", "--gpu-memory", "--host-memory")
ABOVE_ZERO = ("nan", "inf", "-inf", "-1", "0", "1e400", "x")
FROM_ZERO = ("nan", "inf", "-1", "x")
WHOLE = ("-1", "1.5", "nan", "1e3", str(10**20), "9" * 5000)


@pytest.mark.parametrize(
    "tool, flag, value",
    [
        *((("consolidate_checkpoint", "x", "y"), "--max-shard-gb", value) for value in ABOVE_ZERO),
        *((GENERATE, f"{FPDT}-host-memory", value) for value in ABOVE_ZERO),
        *((GENERATE, f"{FPDT}-device-memory", value) for value in FROM_ZERO),
        *((NEEDLE, f"{FPDT}-device-memory", value) for value in FROM_ZERO),
        *((PLAN, flag, value) for flag in PLAN_FLAGS for value in ABOVE_ZERO),
        *((PLAN, "--device-memory", value) for value in FROM_ZERO),
        *((GENERATE, "--seed", value) for value in WHOLE),
        *((NEEDLE, "--seed", value) for value in WHOLE),
        *((("make_recall_corpus", "--output-prefix", "x"), "--seed", value) for value in WHOLE),
        *((GENERATE, "--vocab-size", value) for value in (*WHOLE, "0")),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused(capsys, tool, flag, value):
    name, *arguments = tool
    with pytest.raises(SystemExit) as end:
        run_tool(name, *arguments, f"{flag}={value}")
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {flag}: " in error
    assert " must be a " in error
    assert len(error) < 300
