"""The tables of docs/reach.md."""

import pytest

from tests.unit.tools.tool import TOOLS, load_tool

plan_reach = load_tool("plan_reach")
DOCUMENT = (TOOLS.parent / "docs" / "reach.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "machine, what",
    [("24 GB + 64 GiB", "LoRA"), ("24 GB + 64 GiB + 2 TB of disk", "LoRA"), ("4 x 141 GB + 503 GiB", "all weights")],
    ids=str,
)
def test_a_row_of_the_table_is_what_the_planner_finds(machine, what):
    models = plan_reach.MODELS[:2]
    *_, planned = plan_reach.lines_of(models, [machine], [what])
    (written,) = (line for line in DOCUMENT.splitlines() if line.startswith(f"| {machine}, {what} |"))
    assert written.startswith(planned.removesuffix("|"))


def test_only_the_table_between_its_comments_is_replaced():
    before, after = "# Title\n\n<!-- a -->\n\n", "\n\n<!-- end of a -->\n\nText.\n"
    assert plan_reach.with_table(f"{before}| old |{after}", "a", ["| new |", "|---|"]) == (
        f"{before}| new |\n|---|{after}"
    )
