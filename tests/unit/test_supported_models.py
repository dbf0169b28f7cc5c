"""The tables of supported models in the README and in docs/ come from the list that is tested."""

import pytest

from tests.families import FAMILIES, KINDS, REPOSITORY, TABLES, kind_of, with_table


@pytest.mark.parametrize("page", TABLES)
def test_a_page_lists_the_families_that_are_tested(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert with_table(text, TABLES[page]()) == text, "run `python -m tests.families`"


def test_every_kind_has_models_and_no_family_is_listed_twice() -> None:
    assert {kind_of(family) for family in FAMILIES} == set(KINDS)
    assert len({family.model_type for family in FAMILIES}) == len(FAMILIES)
