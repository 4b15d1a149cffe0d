"""The order in which the hosts of a connection string are tried.

Of the servers of a cluster one takes writes, and `target_session_attrs=read-write` (or `primary`)
passes the others over, which costs a connection to each. One that is frozen accepts a connection
and says nothing more, which costs the `connect_timeout`, and that is 2 s at least. So this process
remembers where it was connected last, and tries that host first; and last, once it was silent or
no host could be connected to. Then a worker that has found the new primary finds it immediately for
its handlers and clients, and stays there when the old one is back and does not know yet that
it is not the primary any more.

With another `target_session_attrs`, or none, the order is the user's.
"""

from collections.abc import Mapping
from math import inf
from time import monotonic
from typing import Any, TypeAlias

import psycopg

Address: TypeAlias = tuple[str, str]
"""A host, or its numeric address, and a port."""

_LISTS = ("host", "hostaddr", "port")

_silent_at = -inf
"""When a server of this process did not answer last."""

_found: dict[Address, float] = {}
"""When a host was last connected to; negative: when it was found to be silent."""


def ordered(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the hosts in the order in which to try them."""
    if settings.get("target_session_attrs") not in ("read-write", "primary"):
        return settings
    addresses = _addresses(settings)
    order = sorted(range(len(addresses)), key=lambda n: -_found.get(addresses[n], 0.0))
    if order == [*range(len(addresses))]:
        return settings
    ours = dict(settings)
    for name in _LISTS:
        each = str(settings.get(name) or "").split(",")
        if len(each) == len(order):
            ours[name] = ",".join(each[n] for n in order)
    return ours


def connected(settings: Mapping[str, Any], connection: psycopg.BaseConnection[Any]) -> None:
    """Record where a connection leads."""
    if len(_addresses(settings)) > 1:
        _found[_address(connection)] = monotonic()


def not_connected(settings: Mapping[str, Any]) -> None:
    """Record that no host could be connected to: the one that was found last may be silent."""
    found = [address for address in _addresses(settings) if _found.get(address, 0.0) > 0]
    for address in found:
        _found[address] = -monotonic() if address == found[0] else 0.0


def silent(connection: psycopg.BaseConnection[Any]) -> None:
    """Record that the server of a connection does not answer."""
    global _silent_at  # noqa: PLW0603
    _silent_at = monotonic()
    address = _address(connection)
    if address in _found:
        _found[address] = -monotonic()


def was_silent_since(moment: float) -> bool:
    """Whether any server of this process has left a query without an answer since.

    A connection that was idle then may lead to that server, and be silent as well: it costs less to
    connect again than to wait.
    """
    return _silent_at >= moment


def _addresses(settings: Mapping[str, Any]) -> list[Address]:
    hosts = str(settings.get("host") or settings.get("hostaddr") or "").split(",")
    ports = str(settings.get("port") or "").split(",")
    if len(ports) < len(hosts):
        ports = ports[:1] * len(hosts)
    return [(host, port or "5432") for host, port in zip(hosts, ports, strict=False)]


def _address(connection: psycopg.BaseConnection[Any]) -> Address:
    return connection.info.host, str(connection.info.port)
