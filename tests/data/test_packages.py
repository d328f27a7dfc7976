"""Messages about packages that are not installed name an extra that brings them."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from vla_rl.data.packages import _NEEDED, needed

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.mark.parametrize("module", sorted(_NEEDED))
def test_the_extra_that_is_named_brings_the_package(module, monkeypatch):
    distribution, extra = _NEEDED[module]
    (requirements,) = re.findall(rf"^{extra} = \[(.*)\]$", PROJECT.read_text(), re.MULTILINE)
    names = re.findall(r'"([\w-]+)', requirements)
    brought = {"PyAV": "av"}.get(distribution, distribution)
    assert brought in names
    assert brought in [name.lower() for name in importlib.metadata.packages_distributions().get(module, [brought])]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'needs {distribution}; install it with pip install "vla-rl\[{extra}\]"'):
        needed(module)


def test_a_part_of_a_package_is_imported():
    assert needed("PIL.Image").__name__ == "PIL.Image"
