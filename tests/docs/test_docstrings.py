"""Runs the examples of every docstring of the package."""

import doctest
import importlib
import pkgutil

import pytest

import quire

NAMES = [
    module.name
    for module in pkgutil.walk_packages(quire.__path__, "quire.")
    if not module.name.endswith("__main__")
]
EXAMPLES_AT_LEAST = 12


@pytest.mark.parametrize("name", ["quire", *NAMES])
def test_examples(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_examples_are_found():
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in NAMES]
    found = [test for module in modules for test in finder.find(module) if test.examples]
    assert len(found) >= EXAMPLES_AT_LEAST
