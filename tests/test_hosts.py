"""A connection string with several hosts: in which order they are tried."""

import asyncio
import gc
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing

import psycopg
import pytest
from psycopg.errors import ConnectionTimeout
from psycopg.conninfo import make_conninfo
from support.clients import Colour
from support.waiting import PATIENCE, eventually
from support.workers import Launcher

from bgjob import Complete, EnqueueRequest, Job, Mux
from bgjob._postgres import hosts as order
from bgjob._postgres.connection import AsyncConnection, Connection
from bgjob._postgres.pool import AsyncPooledConnection, PooledConnection
from faults.proxy import Proxy


class Host(Proxy):
    """A host of the server, which counts who connects."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.count = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.count += 1
        await super().accept(reader, writer)


@pytest.fixture
def hosts(dsn: str) -> Iterator[tuple[Host, Host]]:
    with Host(dsn) as first, Host(dsn) as second:
        yield first, second


def dsn_of(hosts: tuple[Host, Host], dsn: str, attributes: str | None = "read-write") -> str:
    return make_conninfo(
        hosts[0].dsn(dsn),
        host="127.0.0.1,127.0.0.1",
        port=",".join(str(host.port) for host in hosts),
        target_session_attrs=attributes,
    )


def enqueue(colour: Colour, dsn: str, id: str) -> None:
    colour.client(dsn).enqueue(EnqueueRequest("q", "t", id=id))


def test_the_host_that_takes_writes_is_tried_first_from_then_on(
    colour: Colour, launcher: Launcher, hosts: tuple[Host, Host], conn: psycopg.Connection
) -> None:
    def own(job: Job, conn: psycopg.Connection) -> Complete:
        conn.execute("select 1")
        return Complete()

    first, second = hosts
    dsn = dsn_of(hosts, colour.dsn)
    first.cut()
    enqueue(colour, dsn, "a")
    tried = first.count
    assert tried

    enqueue(colour, dsn, "b")
    launcher.start(Mux().register("t", own, transactional=True), dsn=dsn)
    assert eventually(lambda: not conn.execute("select from bgjob_job").rowcount)
    assert first.count == tried

    # When it is gone the others are tried, and the one that is found then is kept.
    first.forward()
    second.cut()
    enqueue(colour, dsn, "c")
    assert first.count > tried
    tried = second.count
    second.forward()
    enqueue(colour, dsn, "d")
    assert second.count == tried


def test_a_host_that_was_silent_is_tried_last(
    colour: Colour, hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (PooledConnection, AsyncPooledConnection):
        monkeypatch.setattr(kind, "patience", 1.0)
    first, second = hosts
    client = colour.client(dsn_of(hosts, colour.dsn))
    client.enqueue(EnqueueRequest("q", "t", id="a"))
    tried = first.count
    first.silence()
    with pytest.raises(psycopg.OperationalError, match="no answer"):
        client.enqueue(EnqueueRequest("q", "t", id="b"))
    client.enqueue(EnqueueRequest("q", "t", id="c"))
    assert (first.count, second.count) == (tried, 1)


@pytest.mark.parametrize("attributes", [None, "any", "prefer-standby"])
def test_where_any_server_fits_the_order_is_kept(
    colour: Colour, hosts: tuple[Host, Host], attributes: str | None
) -> None:
    first, _ = hosts
    dsn = dsn_of(hosts, colour.dsn, attributes)
    first.cut()
    enqueue(colour, dsn, "a")
    tried = first.count
    enqueue(colour, dsn, "b")
    assert first.count > tried


def test_a_host_that_does_not_answer_is_the_last_one_until_another_was_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(order, "_found", {("a", "1"): 2.0, ("b", "1"): 1.0})
    settings = {"host": "b,a,c", "port": "1", "target_session_attrs": "primary"}
    tried = []
    for _ in range(3):
        settings = order.ordered(settings)
        tried.append(settings["host"])
        order.not_connected(settings)
    assert tried == ["a,b,c", "b,c,a", "b,c,a"]


def test_a_connection_that_was_given_up_is_closed_while_its_error_is_kept() -> None:
    # An error of a program's log, or of a health report, may be kept for long; and psycopg's own
    # cycles of references wait for the collector, which is off here.
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        host, port = server.getsockname()
        given = {"host": host, "port": port, "user": "u", "dbname": "d", "connect_timeout": 2}

        async def both() -> Sequence[object]:
            connects = (
                asyncio.to_thread(Connection.connect, **given),
                AsyncConnection.connect(**given),
            )
            return await asyncio.gather(*connects, return_exceptions=True)

        gc.disable()
        try:
            errors = asyncio.run(both())
            for _ in errors:
                accepted, _ = server.accept()
                with accepted:
                    accepted.settimeout(PATIENCE)
                    while accepted.recv(1000):
                        pass  # until it is closed
        finally:
            gc.enable()
    assert [type(error) for error in errors] == [ConnectionTimeout] * 2
