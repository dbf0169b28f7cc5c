"""Error messages for unknown flags: the name to use here, the reason for a refusal, or the likely spelling."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence

from megatron.config.upstream_flags import OTHER_NAMES, REFUSED

ALIKE = 0.8  # similarity of two spellings of one word: one letter of five differs
SHORT_WORD = 3  # letters; words as short as "min" and "max" differ in one letter and mean the opposite


def describe_unknown(words: Sequence[str], known: Sequence[str]) -> str:
    """Return the message for words that no flag consumed, about the first flag among them; `known` are flag names."""
    word = next((word for word in words if word.startswith("-")), words[0])
    name = word.partition("=")[0].removeprefix("--")
    if not word.startswith("--"):
        return f"{word!r} belongs to no flag; put it after the flag that it is a value of, or remove it"
    if name in OTHER_NAMES:
        return f"--{name} is not a flag here; use --{OTHER_NAMES[name]} instead"
    for flag in REFUSED:
        if flag.name == name:
            return f"--{name} cannot be honored: {flag.why}; {flag.advice or 'remove it'}"
    meant = next((other for other in known if is_misspelling(name, other)), None)
    advice = f"did you mean --{meant}?" if meant else "remove it"
    return f"--{name} is not a known flag; {advice} (--help lists every flag)"


def is_misspelling(name: str, other: str) -> bool:
    """Whether `name` can only be `other` with a typo of a letter or two in one of its words.

    Flags that share all words but one, such as --no-load-optim and --no-save-optim, mean different things.
    """
    pairs = list(itertools.zip_longest(name.split("-"), other.split("-"), fillvalue=""))
    different = [(mine, theirs) for mine, theirs in pairs if mine != theirs]
    return len(different) == 1 and _is_typo(*different[0])


def _is_typo(mine: str, theirs: str) -> bool:
    if min(len(mine), len(theirs)) <= SHORT_WORD or _digits(mine) != _digits(theirs):
        return False
    return difflib.SequenceMatcher(None, mine, theirs).ratio() >= ALIKE


def _digits(word: str) -> str:
    return "".join(filter(str.isdigit, word))
