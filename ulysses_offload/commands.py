"""The commands of an installation. Each runs a script of the repository as `python SCRIPT` would.

So a script's first lines, which handle Ctrl-C and the launcher's signals before the slow imports, serve both ways.
A wheel has the training programs as modules beside `megatron`, and `tools/` within this package.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from ulysses_offload.installation import ForeignMegatron, check_installation

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOOLS = HERE / "tools" if (HERE / "tools").is_dir() else ROOT / "tools"


def pretrain() -> None:
    """Pretrain on indexed datasets."""
    run_script(ROOT / "pretrain_gpt.py")


def finetune() -> None:
    """Fine-tune on conversations."""
    run_script(ROOT / "finetune_llama.py")


def plan() -> None:
    """Estimate memory and step time."""
    run_script(TOOLS / "plan_context.py")


def convert() -> None:
    """Convert weights from and to Hugging Face."""
    run_script(TOOLS / "hf2megads_weight_converter.py")


def preprocess() -> None:
    """Tokenize text into indexed datasets."""
    run_script(TOOLS / "preprocess_data.py")


def generate() -> None:
    """Generate text."""
    run_script(TOOLS / "generate_samples_gpt.py")


def evaluate() -> None:
    """Measure how well a model uses a long context."""
    run_script(TOOLS / "eval_long_context.py")


def run_script(script: Path) -> None:
    """Run a script as the main program, unless another package is in the way of `megatron`."""
    try:
        check_installation()
    except ForeignMegatron as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    runpy.run_path(str(script), run_name="__main__")
