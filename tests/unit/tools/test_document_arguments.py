from megatron.arguments import build_parser
from tests.unit.tools.tool import load_tool, run_tool


def test_the_page_of_arguments_is_what_the_code_says():
    assert run_tool("document_arguments", "--check") == 0, "run python tools/document_arguments.py"


def test_every_flag_of_the_help_has_a_row():
    page = load_tool("document_arguments").page()
    flags = {option for action in build_parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert len(flags) > 100
    assert [flag for flag in flags if f"| `{flag}` |" not in page] == []


def test_a_page_that_is_behind_is_found(tmp_path, monkeypatch, capsys):
    tool = load_tool("document_arguments")
    monkeypatch.setattr(tool, "PAGE", tmp_path / "arguments.md")
    assert tool.main(["--check"]) == 1
    assert "is not what the code says" in capsys.readouterr().err
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0
