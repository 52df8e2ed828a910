"""Of parametrized tests as many cases as have every value of every parameter (`--each-choice`).

Where a test takes 4 recipes and 5 layouts these are 5 of its 20 cases: "each choice" coverage.
`make test-abi` runs them: `make test` has run all cases of the same library, and another torch
changes what it offers and returns, which goes by values and not by their combinations.
"""

from collections import defaultdict


def choices(item):
    """The values that a case has of each of its test's parameters; those of one
    `pytest.mark.parametrize` are one choice, because its rows are chosen as they are."""
    params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    found = set()
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else names
        found.add((*names, *(id(params.pop(n)) for n in names if n in params)))
    return found | {(name, id(value)) for name, value in params.items()}


def covering(cases):
    """Indices of cases, sets of choices, that have all choices together: always the one of the
    most new choices, so that few are needed."""
    left = set().union(*cases)
    kept = set() if left else set(range(len(cases)))
    while left:
        most = max(range(len(cases)), key=[len(case & left) for case in cases].__getitem__)
        kept.add(most)
        left = left - cases[most]
    return kept


def select(items):
    """Returns (the cases that are run, those that are not); a case that is skipped stays, and
    stands for no value."""
    tests, kept = defaultdict(list), set()
    for item in items:
        if item.get_closest_marker("skip"):
            kept.add(item)
        else:
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        kept |= {cases[i] for i in covering([choices(case) for case in cases])}
    return [i for i in items if i in kept], [i for i in items if i not in kept]
