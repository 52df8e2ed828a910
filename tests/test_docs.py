"""The pages of docs/: the API pages show all that is public."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import quaver as qv

ROOT = Path(__file__).resolve().parents[1]
SHOWN = re.compile(r"^::: (\S+)\n    options:\n      members: \[(.*)\]$", re.M)


API = ROOT / "docs" / "api"


@pytest.fixture(scope="module")
def shown():
    """{id: object} of what the API pages show by its docstring."""
    things = [
        getattr(importlib.import_module(module), member)
        for page in API.glob("*.md")
        for module, members in SHOWN.findall(page.read_text())
        for member in members.split(", ")
    ]
    return {id(thing): thing for thing in things}


def test_every_object_of_the_api_pages_has_a_docstring(shown):
    assert len(shown) > 80
    assert [thing for thing in shown.values() if not (thing.__doc__ or "").strip()] == []


@pytest.mark.parametrize("module", [qv, qv.recipe, qv.optim, qv.nn, qv.ops, qv.distributed])
def test_an_api_page_names_all_that_is_public(module, shown):
    page = (API / f"{module.__name__.rpartition('.')[2]}.md").read_text()
    public = getattr(module, "__all__", ["Recipe", "get", "names", "step_names"])
    missing = []
    for name in public:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            missing += [name] if id(thing) not in shown else []
        elif not re.search(rf"`(\w+\.)*{name}\b", page):  # data, a module, or native
            missing.append(name)
    assert len(public) > 3 and missing == []
