"""The compiled part and the packages; everything else is in pyproject.toml.

The compiled part, the index builders of megatron/data/helpers.cpp, is optional: without pybind11 or a compiler the
installation succeeds and numpy does the work. The scripts that the commands run are installed under names that do not
get in the way of others: `tools` as `ulysses_offload.tools`.
"""

from setuptools import Extension, find_namespace_packages, find_packages, setup


def extensions() -> list[Extension]:
    """The index builders, or nothing where pybind11 is absent."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        return []
    helpers = Pybind11Extension(
        "megatron.data._helpers",
        ["megatron/data/helpers.cpp"],
        cxx_std=17,
        # A fused multiply-add would round the blending weights differently from numpy.
        extra_compile_args=["-O3", "-ffp-contract=off"],
    )
    helpers.optional = True
    return [helpers]


PACKAGES = find_namespace_packages(include=["megatron", "megatron.*", "ulysses_offload"])
TOOLS = ["ulysses_offload.tools", *(f"ulysses_offload.tools.{name}" for name in find_packages("tools"))]

setup(
    ext_modules=extensions(),
    packages=[*PACKAGES, *TOOLS],
    package_dir={"ulysses_offload.tools": "tools"},
    package_data={"ulysses_offload.tools.report": ["*.css", "*.js"]},
    py_modules=["pretrain_gpt", "finetune_llama"],
)
