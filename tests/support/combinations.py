"""Which combinations of a test's parameters run; with --every-combination all of them.

The usual run leaves out two kinds:

- The sync text of the library is made from the async text, and `.ci/colours.py --check` holds them
  equal: what one test shows of one colour it shows of the other. So of two tests that differ in
  nothing but the colour one is left out. Which one depends on the test's name, and changes with its
  other parameters in the order of Thue and Morse (0110 1001 …), so that also where these have two
  or four values each of them meets either colour.
- Of a test with a database and several parameters as few combinations run as have each value of
  each parameter. Where they begin depends on the test's name.

CI runs all. `@pytest.mark.both_colours` is for tests of what is written twice: the ends of workers
and clients, their loops and pools. `@pytest.mark.every_combination` is for those in which the
combination is the case: the moment at which a connection breaks, and the statement that it breaks;
what the planner knows, and how it may plan.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TypeVar
from zlib import crc32

import pytest

T = TypeVar("T")

TWINS = re.compile(r"(?<![^[-])Async(?=Worker|Client)|(?<![^[-])async(?![^]-])")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-combination",
        action="store_true",
        help="run each test as sync and as async, and with every combination of its parameters",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the usual run leaves out, unless a combination is named."""
    named = any("[" in argument for argument in config.args)
    if named or config.getoption("--every-combination"):
        return
    left_out = set(twins(items))
    left_out.update(repeated([item for item in items if item not in left_out]))
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def is_marked(item: pytest.Item, *names: str) -> bool:
    return any(map(item.get_closest_marker, names))


def name_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def twins(items: Sequence[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield one of two tests that differ in their colour only."""
    by_id = {item.nodeid: item for item in items}
    turns: Counter[str] = Counter()
    for item in items:
        sync = by_id.get(sync_of(item.nodeid))
        if sync is None or sync is item or is_marked(item, "both_colours", "soak"):
            continue
        name = name_of(item)
        is_syncs = (crc32(name.encode()) + turns[name].bit_count()) % 2
        turns[name] += 1
        yield item if is_syncs else sync


def sync_of(nodeid: str) -> str:
    """Return the id of the sync twin of an async test, and of any other its own."""
    return TWINS.sub(lambda found: "thread" if found[0] == "async" else "", nodeid)


def repeated(items: Sequence[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield tests with a database whose every parameter has its value in another test, too."""
    by_name: defaultdict[str, dict[pytest.Item, set[object]]] = defaultdict(dict)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            if "dsn" in item.fixturenames and not is_marked(item, "every_combination", "soak"):
                by_name[name_of(item)][item] = values_of(item)
    for name, values in by_name.items():
        begin = crc32(name.encode()) % len(values)
        order = [*values][begin:] + [*values][:begin]
        yield from values.keys() - fewest({test: values[test] for test in order})


def values_of(test: pytest.Function) -> set[object]:
    """Return the values of a test's parameters; what one decorator sets together is one."""
    params = {name: id(value) for name, value in test.callspec.params.items()}
    values: set[object] = set()
    for mark in test.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = names.replace(",", " ").split() if isinstance(names, str) else names
        values.add(tuple((name, params.pop(name)) for name in names))
    return values | set(params.items())


def fewest(values: Mapping[T, Set[object]]) -> list[T]:
    """Return as few keys as have all the values, and have each of them about as often."""
    uses: Counter[object] = Counter({value: 0 for some in values.values() for value in some})
    taken = []

    def rank(key: T) -> tuple[int, int]:
        return sum(not uses[value] for value in values[key]), -sum(uses[v] for v in values[key])

    while not all(uses.values()):
        taken.append(max(values, key=rank))
        uses.update(values[taken[-1]])
    return taken
