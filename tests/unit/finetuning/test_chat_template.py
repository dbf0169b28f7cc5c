"""Files of templates and settings that cannot be used are named in one line."""

import json
from pathlib import Path

import pytest

from megatron.config import ConfigError, TokenizerConfig
from megatron.config.finetuning import FinetuningConfig
from megatron.finetuning.chat_template import JinjaTemplate, find_template

DEEP = "[" * 100_000


def flags_of(folder: Path, settings: str = "{}") -> TokenizerConfig:
    (folder / "tokenizer_config.json").write_text(settings)
    return TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(folder))


@pytest.mark.parametrize(
    "source, words",
    [
        ("{% for", "unexpected 'end of template'"),
        ("{% for a in messages %}" * 30 + "{% endfor %}" * 30, "SyntaxError: too many statically nested blocks"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError: maximum recursion depth exceeded"),
        ("{{ 10 ** (10 ** 9) }}", "it takes more than 0.2 seconds"),
    ],
    ids=["cut off", "nested loops", "nested brackets", "endless"],
)
def test_a_template_that_does_not_compile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    monkeypatch.setattr("megatron.finetuning.jinja_sandbox.SECONDS_TO_RENDER", 0.2)
    with pytest.raises(ConfigError, match=r"is no Jinja template: .*; repair it or give another file") as caught:
        find_template(flags_of(tmp_path, json.dumps({"chat_template": source})), FinetuningConfig())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings, words", [("{", "Expecting property name"), (DEEP, "nested too deep")])
def test_settings_that_are_no_json_are_named(tmp_path: Path, settings: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"tokenizer_config\.json is no readable JSON: .*{words}"):
        find_template(flags_of(tmp_path, settings), FinetuningConfig())


def test_conversations_with_tools_take_the_template_of_that_name(tmp_path: Path) -> None:
    named = [{"name": name, "template": f"{name} {{{{ messages[-1].content }}}}"} for name in ("default", "tool_use")]
    template = find_template(flags_of(tmp_path, json.dumps({"chat_template": named})), FinetuningConfig())
    assert isinstance(template, JinjaTemplate)
    assert (template.source.split()[0], str(template.tool_source).split()[0]) == ("default", "tool_use")
    (tmp_path / "own").write_text("own")
    given = find_template(flags_of(tmp_path), FinetuningConfig(chat_template=str(tmp_path / "own")))
    assert given == JinjaTemplate("own")
