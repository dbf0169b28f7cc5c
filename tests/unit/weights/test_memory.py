"""Consolidating uses little more memory than one tensor, measured on the process, mapped pages included."""

import subprocess
import sys
from pathlib import Path

import torch
from deepspeed.utils.tensor_fragment import fragment_address

from megatron.weights.opening import open_state
from tests.unit.tools.tool import TOOLS

MIB = 2**20
NUM_RANKS, NUM_TENSORS, TENSOR_BYTES = 2, 24, 12 * MIB  # 288 MiB of weights
NUMEL = TENSOR_BYTES // 4
# The tensor, its copy in another dtype, the mapped files (64 MiB), and the tool's late imports.
ALLOWED_BYTES = 140 * MIB

PROGRAM = """
import importlib.util, os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
spec = importlib.util.spec_from_file_location("tool", sys.argv[1])
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
before = peak()
assert tool.main(sys.argv[2:]) == 0
print(peak() - before)
"""


def write_checkpoint(folder: Path) -> None:
    """Write a ZeRO-2 checkpoint of a model of NUM_TENSORS parameters on two ranks, without moments."""
    names = [f"layers.{number}.weight" for number in range(NUM_TENSORS)]
    shape = torch.Size((NUMEL // 1024, 1024))
    model = {"module": {}, "param_shapes": [dict.fromkeys(names, shape)], "shared_params": {}}
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    for rank in range(NUM_RANKS):
        flat = torch.arange(NUM_TENSORS * NUMEL // NUM_RANKS, dtype=torch.float32) + rank
        own = names[rank * NUM_TENSORS // NUM_RANKS : (rank + 1) * NUM_TENSORS // NUM_RANKS]
        states = {
            "zero_stage": 2,
            "partition_count": [NUM_RANKS],
            "loss_scaler": None,
            "base_optimizer_state": {"state": {}, "param_groups": []},
            "single_partition_of_fp32_groups": [flat],
            "param_slice_mappings": [
                {name: fragment_address(NUMEL, position * NUMEL) for position, name in enumerate(own)}
            ],
        }
        torch.save({"optimizer_state_dict": states}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def test_consolidating_needs_memory_for_a_tensor_and_not_for_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "global_step1"
    folder.mkdir()
    write_checkpoint(folder)
    tool = str(TOOLS / "consolidate_checkpoint.py")
    command = [sys.executable, "-c", PROGRAM, tool, str(folder), str(tmp_path / "weights"), "--dtype", "bf16"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TOOLS.parent)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout.split()[-1]) < ALLOWED_BYTES
    weights, source = open_state(tmp_path / "weights"), open_state(folder)
    for name in ("layers.0.weight", f"layers.{NUM_TENSORS - 1}.weight"):
        assert torch.equal(weights.get(name), source.get(name).bfloat16())
