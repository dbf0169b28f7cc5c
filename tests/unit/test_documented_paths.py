"""Paths and names of the code that the docs mention exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("docs/*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
PATH = re.compile(
    r"`((?:megatron|ulysses_offload|tools|tests|benchmarks|examples_deepspeed|docs)/[\w/.-]*)(?::([\w.]+))?`"
)


def documented_paths(page: Path) -> list[tuple[str, str]]:
    return PATH.findall(page.read_text(encoding="utf-8"))


def names_in(tree: ast.AST, prefix: str = "") -> set[str]:
    """Functions, classes, their members and assigned names, with dots."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            names |= names_in(node, f"{prefix}{node.name}.")
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_and_name_in_a_page_exists(page: Path) -> None:
    for path, name in documented_paths(page):
        assert (ROOT / path).exists(), path
        if name:
            assert name in names_in(ast.parse((ROOT / path).read_text(encoding="utf-8"))), f"{path}:{name}"


def test_the_code_map_answers_questions_with_three_places_at_most() -> None:
    rows = [row for row in (ROOT / "docs/code_map.md").read_text(encoding="utf-8").splitlines() if "? |" in row]
    assert len(rows) >= 20
    assert all(1 <= len(PATH.findall(row)) <= 3 for row in rows)
