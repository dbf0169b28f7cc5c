"""The rooms of megatron/ and what each may import and do, checked on the source itself."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "megatron"

# room: what it may import of megatron besides itself, from the ground up
RULES: dict[str, set[str]] = {
    "config": {"core"},
    "core": set(),
    "ops": {"core"},
    "tokenizer": {"core", "config"},
    "data": {"tokenizer", "core", "config"},
    "finetuning": {"data", "tokenizer", "core", "config"},
    "fpdt": {"ops", "core", "config"},
    "model": {"fpdt", "ops", "core", "config"},
    "optimizer": {"core", "config"},
    "logging": {"core", "config"},
    "weights": {"model", "data", "core", "config"},
    "planner": {"fpdt", "logging", "core", "config"},
    "engine": {"weights", "core", "config"},
    "generation": {"weights", "model", "fpdt", "ops", "core", "config"},
    "hf": {"weights", "model", "fpdt", "ops", "tokenizer", "core", "config"},
    "evaluation": {"generation", "model", "core", "config"},
    "arguments": {"core", "config"},
}
# Only what stands on these may print, read the environment, or wait for the device or for other ranks.
QUIET_ROOMS = set(RULES)
RULES["ranks"] = {"logging", "config"}
RULES["initialize"] = {"ranks", "logging", "core", "config"}
RULES["checkpointing"] = set(RULES)
RULES["monitoring"] = set(RULES)
RULES["training"] = set(RULES)
RULES["launch"] = set(RULES)

# package: the only rooms that may import it
RESERVED = {"deepspeed": {"engine"}, "argparse": {"arguments"}, "megatron.global_vars": set[str]()}

# (name, whether an attribute such as tensor.item() counts, whether a plain name such as print() counts)
BANNED_CALLS = [("print", False, True), ("item", True, False)]
BANNED_CALLS += [(name, True, True) for name in ("barrier", "monitored_barrier", "synchronize", "getenv", "putenv")]
BANNED_ATTRIBUTES = {"os.environ"}
BANNED_NAMES_FROM_OS = {"environ", "getenv", "putenv"}
# (file, call): memory is unpinned, once in a long while, when no copy to or from it can be under way.
# The disk's threads, not the main one, wait until a copy is over before they write or read its memory.
ALLOWED_CALLS = {("fpdt/host_pool.py", "synchronize"), ("fpdt/disk_tier.py", "synchronize")}
# Statements that a module may have at its top level besides definitions; a bare call would be code at import time.
TOP_LEVEL = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)

FILES = sorted(ROOT.rglob("*.py"))
REPOSITORY = ROOT.parent
COMMANDS = REPOSITORY / "ulysses_offload"  # which check what `import megatron` gives before anything imports it
PROGRAMS = [REPOSITORY / "pretrain_gpt.py", REPOSITORY / "finetune_llama.py"]
PROGRAMS += sorted(file for folder in ("tools", "benchmarks") for file in (REPOSITORY / folder).rglob("*.py"))
MOST_PARAMETERS = 6


def room_of(file: Path) -> str:
    """Return the sub-package of a file, the file's own name at the top, or "" for megatron/__init__.py."""
    first = file.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def files_of_quiet_rooms() -> list[Path]:
    return [file for file in FILES if room_of(file) in QUIET_ROOMS]


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything imported; `from a import b` gives both "a" and "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full, so that the room can be seen"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def import_faults(tree: ast.AST, room: str) -> Iterator[str]:
    for line, name in imported_modules(tree):
        parts = name.split(".")
        if parts[0] == "megatron" and len(parts) > 1 and parts[1] in RULES:
            allowed = RULES.get(room, set()) | {room}
            if parts[1] not in allowed:
                yield f"line {line}: {room} imports {name}; it may import {', '.join(sorted(allowed))}"
        for package, owners in RESERVED.items():
            if (name == package or name.startswith(package + ".")) and room not in owners:
                yield f"line {line}: {room} imports {name}; only {', '.join(sorted(owners)) or 'nobody'} may"


def banned_uses(tree: ast.AST, file: str = "") -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            is_attribute = isinstance(node.func, ast.Attribute)
            called = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            for name, as_attribute, as_name in BANNED_CALLS:
                is_banned = as_attribute if is_attribute else as_name
                if called == name and is_banned and (file, name) not in ALLOWED_CALLS:
                    yield f"line {node.lineno}: {name}() is for ranks/, initialize.py and what imports them"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in BANNED_ATTRIBUTES:
            yield f"line {node.lineno}: {ast.unparse(node)} is for ranks/, initialize.py and what imports them"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in BANNED_NAMES_FROM_OS:
                    yield f"line {node.lineno}: os.{alias.name} is for ranks/, initialize.py and what imports them"


def code_at_import_time(tree: ast.Module) -> Iterator[str]:
    for statement in tree.body:
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_guarded_import = isinstance(statement, (ast.If, ast.Try)) and all(
            isinstance(inner, TOP_LEVEL) for inner in statement.body
        )
        if not (isinstance(statement, TOP_LEVEL) or is_docstring or is_guarded_import):
            yield f"line {statement.lineno}: {type(statement).__name__} runs at import time"


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the parameters that a caller may give; a method's self or cls is not one."""
    every = function.args
    named = [*every.posonlyargs, *every.args, *every.kwonlyargs]
    starred = [argument for argument in (every.vararg, every.kwarg) if argument]
    return len([argument for argument in named + starred if argument.arg not in ("self", "cls")])


def functions_of_many_parameters(tree: ast.AST) -> Iterator[str]:
    """Yield functions with too many parameters, except `forward` of an autograd.Function, where torch dictates them."""
    exempt: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(
            ast.unparse(base).endswith("autograd.Function") for base in node.bases
        ):
            exempt |= {inner for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name == "forward"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node in exempt:
            continue
        if (count := num_parameters(node)) > MOST_PARAMETERS:
            yield f"line {node.lineno}: {node.name} has {count} parameters"


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def file_name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=file_name)
def test_every_file_belongs_to_a_known_room(file):
    assert room_of(file) in RULES or file == ROOT / "__init__.py", f"give {room_of(file)} a row in RULES"


@pytest.mark.parametrize("file", FILES, ids=file_name)
def test_imports_go_one_way(file):
    assert list(import_faults(parsed(file), room_of(file))) == []


@pytest.mark.parametrize("file", sorted(COMMANDS.glob("*.py")), ids=lambda file: file.name)
def test_the_commands_import_only_the_standard_library(file):
    packages = {name.partition(".")[0] for _, name in imported_modules(parsed(file))}
    assert packages <= {*sys.stdlib_module_names, COMMANDS.name}


@pytest.mark.parametrize("file", files_of_quiet_rooms(), ids=file_name)
def test_quiet_rooms_keep_the_bans(file):
    assert list(banned_uses(parsed(file), file_name(file))) == []


@pytest.mark.parametrize("file", FILES, ids=file_name)
def test_no_code_runs_at_import_time(file):
    assert list(code_at_import_time(parsed(file))) == []


@pytest.mark.parametrize("file", FILES, ids=file_name)
def test_files_stay_within_400_lines(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("file", FILES, ids=file_name)
def test_functions_stay_within_60_lines(file):
    functions = [node for node in ast.walk(parsed(file)) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 60] == []


@pytest.mark.parametrize("file", [*FILES, *PROGRAMS], ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_functions_have_at_most_six_parameters(file):
    assert list(functions_of_many_parameters(parsed(file))) == []


def test_the_rules_have_no_cycles():
    order: list[str] = []
    while len(order) < len(RULES):
        ready = [room for room, below in RULES.items() if room not in order and below <= set(order)]
        assert ready, f"a cycle among {set(RULES) - set(order)}"
        order += ready


@pytest.mark.parametrize(
    "source, room",
    [
        ("import megatron.model.builder", "fpdt"),
        ("from megatron import training", "model"),
        ("from megatron.fpdt.plan import ChunkPlan", "ops"),
        ("def f():\n    import deepspeed", "fpdt"),
        ("from deepspeed.runtime import zero", "training"),
        ("from argparse import ArgumentParser", "config"),
    ],
)
def test_a_forbidden_import_is_found(source, room):
    assert list(import_faults(ast.parse(source), room)) != []


@pytest.mark.parametrize(
    "source",
    [
        "print(1)",
        "x.item()",
        "os.environ['A']",
        "os.getenv('A')",
        "from os import environ",
        "dist.barrier()",
        "torch.cuda.synchronize()",
    ],
)
def test_a_banned_use_is_found(source):
    assert list(banned_uses(ast.parse(source))) != []


@pytest.mark.parametrize("source", ["pattern.items()", "self.print()", "self.item = 3", "event.wait(stream)"])
def test_an_innocent_use_is_not_found(source):
    assert list(banned_uses(ast.parse(source))) == []


@pytest.mark.parametrize("source", ["main()", "for i in x:\n    pass", "with x:\n    pass", "if a:\n    main()"])
def test_code_at_import_time_is_found(source):
    assert list(code_at_import_time(ast.parse(source))) != []


@pytest.mark.parametrize(
    "source",
    [
        "def f(a, b, c, d, e, f, g): ...",
        "async def f(a, b, c, *, d, e, f, g): ...",
        "class A:\n    def f(self, a, b, c, d, e, *f, **g): ...",
        "class A(torch.autograd.Function):\n    def backward(ctx, a, b, c, d, e, f): ...",
        "class A(nn.Module):\n    def forward(self, a, b, c, d, e, f, g): ...",
    ],
)
def test_a_function_of_seven_parameters_is_found(source):
    assert len(list(functions_of_many_parameters(ast.parse(source)))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def f(self, a, b, c, d, e, f): ...",
        "class A:\n    @classmethod\n    def f(cls, a, b, c, d, *, e, f): ...",
        "class A(torch.autograd.Function):\n    def forward(ctx, a, b, c, d, e, f, g): ...",
    ],
)
def test_a_function_of_six_parameters_is_not_found(source):
    assert list(functions_of_many_parameters(ast.parse(source))) == []
