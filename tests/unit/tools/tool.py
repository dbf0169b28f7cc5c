"""Run a tool in this process as the command line would."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[3] / "tools"
sys.path.insert(0, str(TOOLS))  # as it is when Python runs a tool


def load_tool(name: str) -> ModuleType:
    """Import tools/NAME.py, which is a script and not part of a package."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(name: str, *arguments: object) -> int:
    """Return the exit code of tools/NAME.py with these arguments."""
    code: int = load_tool(name).main([str(argument) for argument in arguments])
    return code
