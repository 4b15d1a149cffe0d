"""Each test runs in one of the two colours, by turns; with --both-colours in both.

The sync text of the library is made from the async text, and `.ci/colours.py --check` holds them
equal: what one test shows of one colour it shows of the other. So of two tests that differ in
nothing but the colour one is left out. Which one depends on the test's name, and changes with its
other parameters in the order of Thue and Morse (0110 1001 …), so that also where these have two
or four values each of them meets either colour. CI runs both.

`@pytest.mark.both_colours` is for tests of what is written twice: the ends of workers and clients,
their loops and pools.
"""

import re
from collections import Counter
from zlib import crc32

import pytest

TWINS = re.compile(r"(?<![^[-])Async(?=Worker|Client)|(?<![^[-])async(?![^]-])")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--both-colours", action="store_true", help="run each test as sync and as async"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out one of two tests that differ in their colour only."""
    named = any("[" in argument for argument in config.args)
    if named or config.getoption("--both-colours"):
        return
    by_id = {item.nodeid: item for item in items}
    turns: Counter[str] = Counter()
    left_out = set()
    for item in items:
        sync = by_id.get(sync_of(item.nodeid))
        both = any(map(item.get_closest_marker, ("both_colours", "soak")))
        if sync is None or sync is item or both:
            continue
        name = item.nodeid.partition("[")[0]
        is_syncs = (crc32(name.encode()) + turns[name].bit_count()) % 2
        turns[name] += 1
        left_out.add(item if is_syncs else sync)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def sync_of(nodeid: str) -> str:
    """Return the id of the sync twin of an async test, and of any other its own."""
    return TWINS.sub(lambda found: "thread" if found[0] == "async" else "", nodeid)
