"""The one compiled part, the index builders of megatron/data/helpers.cpp; everything else is in pyproject.toml.

It is optional: without pybind11 or a compiler the installation succeeds and numpy does the work.
"""

from setuptools import Extension, setup


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


setup(ext_modules=extensions())
