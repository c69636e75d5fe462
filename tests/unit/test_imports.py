"""A package that is there can be made to look absent while another one is imported."""

import importlib
import sys

import pytest

from selma_ray.imports import as_if_absent

UNUSED = "this"  # the Zen of Python, which nothing imports


def test_a_package_is_absent_inside_and_there_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    with as_if_absent(UNUSED), pytest.raises(ImportError):
        importlib.import_module(UNUSED)
    assert importlib.import_module(UNUSED)
    with as_if_absent(UNUSED):
        assert importlib.import_module(UNUSED), "what was imported before stays"
    del sys.modules[UNUSED]
