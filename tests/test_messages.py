"""Messages of several statements: their last results, and calls of libpq that get no answer."""

import socket
import threading
from collections.abc import Iterator
from math import inf
from time import monotonic
from typing import Any

import psycopg
import pytest
from psycopg.errors import error_from_result
from psycopg.pq import TransactionStatus
from psycopg.pq.abc import PGresult
from support.waiting import eventually

from bgjob._postgres.connection import WORKER_PATIENCE, Connection, Silence
from bgjob._postgres.messages import Messages, hang_up
from faults.proxy import Proxy


@pytest.fixture
def connection(dsn: str) -> Iterator[Connection]:
    with Connection.connect(dsn, autocommit=True) as connection:
        yield connection


def told(result: PGresult) -> str:
    """Return what a result says: a value, a command, or an error."""
    if result.error_message:
        return type(error_from_result(result)).__name__
    return ((result.get_value(0, 0) if result.ntuples else result.command_status) or b"").decode()


@pytest.mark.parametrize("has_watch", [True, False])
@pytest.mark.parametrize(
    ("text", "last", "status"),
    [
        (b"select 1; begin; select 2", "2", TransactionStatus.INTRANS),
        (b"select 1; begin; set local bgjob.x = '5'", "SET", TransactionStatus.INTRANS),
        (
            b"begin; select 1; commit; select 1/0; select 3",
            "DivisionByZero",
            TransactionStatus.IDLE,
        ),
        (b"begin; select 1/0; commit; select 3", "DivisionByZero", TransactionStatus.INERROR),
    ],
)
def test_the_last_result_of_a_message_is_its_first_error_or_that_of_its_last_statement(
    connection: Connection, has_watch: bool, text: bytes, last: str, status: TransactionStatus
) -> None:
    messages = Messages(has_watch=has_watch)
    assert told(messages.last_result(connection, text)) == last
    assert connection.pgconn.transaction_status == status
    assert messages.overdue_at == inf


@pytest.mark.parametrize("has_watch", [True, False])
def test_a_session_that_ends_meanwhile_is_an_error(connection: Connection, has_watch: bool) -> None:
    messages = Messages(has_watch=has_watch)
    with pytest.raises(psycopg.OperationalError, match="terminat|closed"):
        messages.last_result(connection, b"select pg_terminate_backend(pg_backend_pid())")
    assert connection.pgconn.transaction_status == TransactionStatus.UNKNOWN
    assert messages.overdue_at == inf


class Waiting:
    """A thread that waits for an answer, and what it got."""

    def __init__(self, messages: Messages, connection: Connection) -> None:
        self.error: BaseException | None = None
        self._messages, self._connection = messages, connection
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            self._messages.last_result(self._connection, b"select 1")
        except BaseException as error:
            self.error = error

    def has_ended(self) -> bool:
        return not self._thread.is_alive()


def test_a_call_without_an_answer_ends_after_its_time_and_harms_no_other_connection(
    dsn: str,
) -> None:
    messages = Messages(has_watch=True)
    with Proxy(dsn) as proxy:
        with Connection.connect(proxy.dsn(dsn)) as silent, Connection.connect(dsn) as other:
            proxy.silence()
            began = monotonic()
            waiting = Waiting(messages, silent)
            assert eventually(lambda: messages.overdue_at < inf)
            assert began <= messages.overdue_at - WORKER_PATIENCE <= monotonic()
            messages.end_overdue(messages.overdue_at - 0.1)
            assert not waiting.has_ended()
            messages.end_overdue(messages.overdue_at)
            assert messages.overdue_at == inf  # once
            assert eventually(waiting.has_ended)
            assert isinstance(waiting.error, Silence)
            assert silent.pgconn.transaction_status == TransactionStatus.UNKNOWN
            assert told(messages.last_result(other, b"select 7")) == "7"


def test_a_close_ends_the_calls_and_later_ones_end_themselves(dsn: str) -> None:
    messages = Messages(has_watch=True)
    with Proxy(dsn) as proxy:
        with (
            Connection.connect(proxy.dsn(dsn)) as silent,
            Connection.connect(proxy.dsn(dsn)) as later,
        ):
            proxy.silence()
            waiting = Waiting(messages, silent)
            assert eventually(lambda: messages.overdue_at < inf)
            messages.close()
            assert eventually(waiting.has_ended)
            later.patience = 0.1
            with pytest.raises(Silence):
                messages.last_result(later, b"select 1")
            assert messages.overdue_at == inf


class Closing:
    """A connection whose socket libpq closes at its first use; the number is then another's."""

    def __init__(self, number: int) -> None:
        self._numbers = iter([number])

    @property
    def socket(self) -> int:
        for number in self._numbers:
            return number
        raise psycopg.OperationalError("the connection is lost")


def test_a_call_that_has_ended_meanwhile_leaves_its_number_to_the_next_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection: Any = Closing(ours.fileno())
        hang_up(connection)
        ours.sendall(b"x")
        assert theirs.recv(1) == b"x"
