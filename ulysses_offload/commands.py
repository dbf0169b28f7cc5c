"""The commands of an installation. Each runs a script of the repository as `python SCRIPT` would.

So a script's first lines, which handle Ctrl-C and the launcher's signals before the slow imports, serve both ways.
A wheel has the training programs as modules beside `megatron`, and `tools/` within this package.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ulysses_offload.installation import ForeignMegatron, check_installation

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOOLS = HERE / "tools" if (HERE / "tools").is_dir() else ROOT / "tools"


class Choice(NamedTuple):
    """One of the scripts of a command, its duty, and the words that it gets before those of the user."""

    script: str
    summary: str
    words: tuple[str, ...] = ()


EVALUATIONS = {
    "perplexity": Choice("eval_long_context.py", "loss of the same tokens by context length", ("perplexity",)),
    "needle": Choice("eval_long_context.py", "find one statement in a long context", ("needle",)),
    "longppl": Choice("eval_long_context.py", "perplexity of the tokens that need the long context", ("longppl",)),
    "short": Choice("eval_long_context.py", "whether a model got worse at short contexts", ("short",)),
    "ruler": Choice("eval_ruler.py", "RULER's tasks at any length"),
    "harness": Choice("eval_harness.py", "tasks of lm-eval at any length"),
}
OTHER_TOOLS = {
    "train-tokenizer": Choice("train_tokenizer.py", "train a tokenizer"),
    "inspect-dataset": Choice("inspect_dataset.py", "check and describe a dataset"),
    "merge-datasets": Choice("merge_datasets.py", "join datasets"),
    "inspect-checkpoint": Choice("inspect_checkpoint.py", "verify and describe a checkpoint"),
    "consolidate-checkpoint": Choice("consolidate_checkpoint.py", "write a checkpoint's weights as safetensors"),
    "make-universal-checkpoint": Choice("make_universal_checkpoint.py", "convert a checkpoint for other ranks"),
    "check-hf-models": Choice("check_hf_models.py", "whether a Hugging Face model trains as in transformers"),
    "plan-reach": Choice("plan_reach.py", "the longest contexts by model and GPUs"),
    "plot-run": Choice("plot_run.py", "plot logs"),
    "report-run": Choice("report_run.py", "report a run as one HTML file"),
    "compact-log": Choice("compact_log.py", "show a log in the compact form"),
}


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
    """Measure how well a model uses a long context, by the evaluation that the first word names."""
    run_choice("ulysses-evaluate", EVALUATIONS)


def tool() -> None:
    """Run the tool that the first word names."""
    run_choice("ulysses-tool", OTHER_TOOLS)


def run_choice(command: str, choices: Mapping[str, Choice]) -> None:
    """Run the script that the first word of the command line chooses; list the choices where it chooses none."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    choice = choices.get(name)
    if choice is not None:
        sys.argv = [command, *choice.words, *sys.argv[2:]]
        run_script(TOOLS / choice.script)
        return
    lines = [f"usage: {command} NAME ...", "", *(f"  {each:26} {choices[each].summary}" for each in choices)]
    if name in ("-h", "--help"):
        print("\n".join([*lines, "", f"{command} NAME --help shows the flags."]))
        return
    fault = f"NAME ({name}) must be one of these" if name else "NAME is missing; give one of these"
    sys.stderr.write("\n".join([*lines, "", f"error: {fault}\n"]))
    sys.exit(2)


def run_script(script: Path) -> None:
    """Run a script as the main program, unless another package is in the way of `megatron`."""
    try:
        check_installation()
    except ForeignMegatron as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    if script.parent == TOOLS:
        sys.path.insert(0, str(TOOLS))  # of the modules that tools share
    runpy.run_path(str(script), run_name="__main__")
