"""Wording of the prompts: our own, or a file's, such as RULER's.

Scores of different wordings do not compare. A file is JSON in the form of the TASKS of RULER's constants.py:

    {"niah": {"template": "... {context} ... {query} ...", "answer_prefix": "...", "tokens_to_generate": 128}, ...}

"needle" and "noise", texts beside the families, replace the hidden sentence and the sentence that is repeated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from megatron.evaluation.errors import EvaluationError

Family = Literal["niah", "variable_tracking", "common_words_extraction", "freq_words_extraction", "qa"]
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class Template:
    """The prompt of a family of tasks: `template`, then `answer_prefix`, which the model continues."""

    template: str
    answer_prefix: str
    tokens_to_generate: int

    def prompt(self, **values: object) -> str:
        """Fill in the placeholders."""
        return (self.template + self.answer_prefix).format(**values)


@dataclass(frozen=True)
class Templates:
    """All wording."""

    families: Mapping[Family, Template]
    one_needle: Template
    """Of needle tasks whose answer is one value."""
    needle: str
    noise: str


def own_templates() -> Templates:
    """Return our own wording."""
    many, one = (
        Template(
            f"The text below hides {some} secret {{type_needle_v}}. Remember {it}, for at the end a question asks for "
            f"{it}.\n{{context}}\nWhat {be} the secret {{type_needle_v}} of {{query}}?",
            f" By the text, the secret {{type_needle_v}} of {{query}} {be}",
            128,
        )
        for some, it, be in (("some", "them", "are"), ("a", "it", "is"))
    )
    return Templates(
        families={
            "niah": many,
            "variable_tracking": Template(
                "The text below assigns values to variables, directly or through other variables. Follow the "
                "assignments.\n\n{context}\nQuestion: which variables have the value {query}?",
                " Answer: these {num_v} variables have the value {query}:",
                30,
            ),
            "common_words_extraction": Template(
                "Some words of the numbered list below occur more often than others. Remember those.\n{context}\n"
                "Question: which 10 words occur most often in the list?",
                " Answer: these 10 words occur most often:",
                120,
            ),
            "freq_words_extraction": Template(
                "Count the words of the coded text below; its dots are no words.\n{context}\nQuestion: which three "
                "coded words occur most often?",
                " Answer: these three coded words occur most often:",
                50,
            ),
            "qa": Template(
                "Answer the question at the end from these documents, in a few words.\n\n{context}\n\nQuestion: "
                "{query}",
                "\nAnswer:",
                32,
            ),
        },
        one_needle=one,
        needle="One of the secret {type_needle_v} of {key} is: {value}.",
        noise="Rain fell on the roofs. A clock struck nine. Nobody crossed the square. The lamps went out one by one.",
    )


def read_templates(path: Path) -> Templates:
    """Read the wording of a file, and take ours where it has none. EvaluationError if it is not as described above."""
    own = own_templates()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        families = {name: _read_template(content[name], own.families[name]) for name in FAMILIES if name in content}
        needle, noise = str(content.get("needle", own.needle)), str(content.get("noise", own.noise))
        values = dict.fromkeys(("context", "query", "type_needle_v", "num_v"), "")
        for family in families.values():
            family.prompt(**values)
        needle.format(type_needle_v="", key="", value="")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise EvaluationError(
            f'--templates ({path}) is not {{"niah": {{"template": "...", "answer_prefix": "..."}}, ...}} with the '
            f"placeholders of its task ({error}); write it like the TASKS of RULER's constants.py."
        ) from error
    one_needle = _for_one_value(families["niah"]) if "niah" in families else own.one_needle
    return Templates({**own.families, **families}, one_needle, needle, noise)


def _read_template(entry: Mapping[str, Any], own: Template) -> Template:
    return Template(
        str(entry["template"]),
        str(entry.get("answer_prefix", "")),
        int(entry.get("tokens_to_generate", own.tokens_to_generate)),
    )


def _for_one_value(template: Template) -> Template:
    """Turn RULER's plural wording into its singular, by the replacements that RULER makes."""

    def singular(text: str) -> str:
        for plural, one in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
            text = text.replace(plural, one)
        return text

    return replace(template, template=singular(template.template), answer_prefix=singular(template.answer_prefix))
