import json

import pytest

from tests.unit.tools.tool import TOOLS, load_tool

plan_context = load_tool("plan_context")

FOUR_H100 = ["--gpus", "4", "--gpu", "H100", "--host-memory", "1000"]
FLAGS = [
    *["--num-layers", "32", "--hidden-size", "4096", "--num-attention-heads", "32", "--seq-length", "262144", "--bf16"],
    *["--ds-sequence-parallel-size", "4", "--ds-sequence-parallel-fpdt", "--ds-sequence-parallel-fpdt-offloading"],
    *["--zero-stage", "3", "--lr", "1e-4", "--train-iters", "10", "--data-path", "corpus"],
    *["--tokenizer-type", "NullTokenizer", "--vocab-size", "50000"],
]


def test_a_model_that_fits(capsys, tmp_path):
    figures, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    argv = ["--model", "llama-8b", *FOUR_H100, "--json", str(figures), "--plot", str(picture)]
    assert plan_context.main(argv) == 0
    text = capsys.readouterr().out
    assert "8.03B parameters on 4 H100, 262,144 tokens" in text
    assert "it fits; flags: --seq-length 262144 --ds-sequence-parallel-size 4" in text
    content = json.loads(figures.read_text())
    assert content["chunk_length"] == content["quickest_chunk"]
    assert content["fits_gpu"]
    assert content["fits_host"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_model_that_does_not_fit_ends_with_what_would(capsys):
    assert plan_context.main(["--model", "llama-8b", *FOUR_H100, "--seq-length", str(2**23)]) == 1
    assert "it does not fit the host:\n  - --seq-length" in capsys.readouterr().out


def test_flags_of_the_training_program_are_planned_as_they_are(capsys, tmp_path):
    figures = tmp_path / "plan.json"
    kernel = ["--use-flash-attn-v2", "--ds-sequence-parallel-fpdt-recompute", "mlp"]
    assert plan_context.main([*FOUR_H100, "--json", str(figures), "--", *FLAGS, *kernel]) == 0
    content = json.loads(figures.read_text())
    assert (content["attention_backend"], content["recompute"]) == ("torch-flash", "mlp")
    assert (content["chunk_length"], content["zero_stage"]) == (65536, 3)


def test_what_a_plan_does_not_depend_on_need_not_be_given(capsys):
    assert plan_context.main([*FOUR_H100, "--", *FLAGS]) == 0
    planned = capsys.readouterr().out
    irrelevant = ["--lr", "1e-4", "--train-iters", "10", "--data-path", "corpus"]
    start = FLAGS.index(irrelevant[0])
    shorter = [*FLAGS[:start], *FLAGS[start + len(irrelevant) :]]
    for flags in (shorter, [*shorter, "--train-samples=7", "--train-data-path", "corpus"]):
        assert plan_context.main([*FOUR_H100, "--", *flags]) == 0
        assert capsys.readouterr().out == planned


def test_a_config_of_hugging_face_is_read(capsys, tmp_path):
    path = tmp_path / "config.json"
    llama = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
    path.write_text(json.dumps(llama))
    assert plan_context.main(["--model", str(path), *FOUR_H100]) == 0
    from_file = capsys.readouterr().out
    assert plan_context.main(["--model", "llama-8b", *FOUR_H100]) == 0
    assert capsys.readouterr().out == from_file


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--model", "llama-8b", "--gpus", "4", "--sequence-parallel", "3"], "use one of 1, 2, 4"),
        (["--model", "nothing"], "is neither a file nor one of gpt-1.3b"),
        (["--model", "llama-8b", "--backend", "cudnn", "--gpu", "A100-80GB"], "use one of torch-flash"),
        (["--gpus", "4", "--", "--num-layers", "2"], "--hidden-size"),
        (["--gpus", "3", "--", *FLAGS], "--ds-sequence-parallel-size (4)"),
        (["--", *(flag for flag in FLAGS if flag != "--ds-sequence-parallel-fpdt-offloading")], "-fpdt-offloading"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(argv, words, capsys):
    assert plan_context.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_the_host_memory_of_this_machine_is_taken_when_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(plan_context, "available_host_bytes", lambda: 7 * 2**30)
    assert plan_context.main(["--model", "llama-8b", "--gpus", "4", "--gpu", "H100", "--host-memory", "here"]) == 1
    assert "GiB   of 1.8; " in capsys.readouterr().out


def test_nothing_to_plan_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        plan_context.main(["--gpus", "4"])
    assert "--model is missing" in capsys.readouterr().err


def test_the_published_table_is_the_one_in_the_docs(capsys):
    assert plan_context.main(["--published"]) == 0
    table = capsys.readouterr().out
    assert table in (TOOLS.parent / "docs" / "planner.md").read_text()
