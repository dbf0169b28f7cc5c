"""A protocol has a name of its own, so that a search for it finds one definition."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_protocol_shares_its_name_with_no_other_definition_of_the_package():
    files: dict[str, list[str]] = defaultdict(list)
    protocols = set()
    for file in sorted((ROOT / "megatron").rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                files[name].append(str(file.relative_to(ROOT)))
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases):
                protocols.add(node.name)
    assert "AttentionBackend" in protocols
    assert {name: files[name] for name in protocols if len(files[name]) > 1} == {}
