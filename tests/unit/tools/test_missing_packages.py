"""Without matplotlib, tensorboard or tqdm: one line in place of a traceback, and no need of them elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
RUN_WITHOUT = (
    "import runpy, sys; names, sys.argv = sys.argv[1].split(','), sys.argv[2:]; "
    "sys.modules.update(dict.fromkeys(names)); sys.path.insert(0, 'tools'); runpy.run_path(sys.argv[0], {}, '__main__')"
)


def run_without(packages: str, *command: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", RUN_WITHOUT, packages, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command, asked",
    [
        (["tools/plot_run.py", "run.log"], "plot_run.py"),
        (["tools/plan_context.py", "--model", "llama-8b", "--gpus", 4, "--plot", "p.png"], "--plot (p.png)"),
        (["tools/inspect_dataset.py", "data", "--plot", "p.png"], "--plot (p.png)"),
        (["tools/draw_figures.py"], "draw_figures.py"),
        (["benchmarks/data_loader.py"], "the picture of data_loader.py"),
        (
            ["tools/eval_long_context.py", "needle", "--load", "m", "--output-dir", "out"],
            "the heat map in --output-dir (out)",
        ),
        (
            ["tools/eval_ruler.py", "--load", "m", "--text", "t", "--output-dir", "out"],
            "the heat map in --output-dir (out)",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_that_draw_say_what_to_install(command: list[object], asked: str) -> None:
    result = run_without("matplotlib", *command)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2
    words = (
        "needs the package matplotlib, which is not installed; run `pip install '.[plots]'` in the folder of this code."
    )
    assert line.endswith(f": {asked} {words}")


def test_events_without_tensorboard_say_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1").touch()
    result = run_without("tensorboard", "tools/plot_run.py", tmp_path, "--output", tmp_path / "run.png")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2
    assert f"{tmp_path}, a folder with TensorBoard events, needs the package tensorboard" in line


def test_a_dataset_is_made_without_any_of_them(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "1 2 3"}\n')
    files = ["--input", tmp_path / "text.jsonl", "--output-prefix", tmp_path / "data"]
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 10]
    result = run_without("matplotlib,tensorboard,tqdm", "tools/preprocess_data.py", *files, *flags)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "data_text_document.bin").exists()


def test_the_training_program_imports_none_of_them_itself_and_peft_for_adapters_alone() -> None:
    hide = "import sys; sys.modules.update(matplotlib=None, tensorboard=None, peft=None)"
    of_hugging_face = "megatron.hf.building, megatron.hf.library, megatron.checkpointing.hugging_face"
    code = f"{hide}; import megatron.launch.program, megatron.engine.engine, pretrain_gpt, {of_hugging_face}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
