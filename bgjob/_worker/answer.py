"""The answer to an exchange: sent statement by statement, awaited, and read."""

from time import monotonic
from typing import Any, LiteralString, NamedTuple, TypeAlias, cast

import psycopg
from psycopg.pq import ExecStatus
from psycopg.rows import TupleRow

from bgjob._engine.reply import Part, Plan, Reply
from bgjob._postgres.cursor import Cursor
from bgjob._sql.execute import send
from bgjob._sql.statement import Statement

Text: TypeAlias = LiteralString | bytes
"""Of a statement. psycopg recognizes it as the same object."""


class Refusing:
    """Turns an exception before sending into a refusal, so that only that statement fails."""

    def __enter__(self) -> None:
        """Begin to make and send a statement."""

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """Raise psycopg.DataError instead of an exception that is not the server's."""
        if isinstance(error, Exception) and not isinstance(error, psycopg.Error):
            raise psycopg.DataError(f"a statement could not be sent: {error!r}") from error


REFUSING = Refusing()


class UnreadError(psycopg.DataError):
    """The exchange was committed, but its answer could not be read."""


class Unread(NamedTuple):
    """A claimed job that could not be read."""

    place: str
    """The position of its row."""
    token: int
    id: str
    """In the notation of Python's bytes."""
    error: Exception


class Answer:
    """The cursors of a sent exchange, borrowed until it is read.

    Each repeats one text, so that it has found already how to convert its values. That would be
    an eighth of the control thread's time for an idle worker's claim (benchmarks/README.md).
    """

    def __init__(self, connection: psycopg.Connection[Any], cursors: dict[Text, Cursor]) -> None:
        self._connection = connection
        self._spare = cursors
        self._used: list[tuple[Text, Cursor]] = []
        self.unread: list[Unread] = []
        self.sent_at = monotonic()
        self._asked: list[tuple[Part[Any], Cursor]] = []

    def ask(self, plan: Plan) -> None:
        """Send the statements of an exchange."""
        for part in plan:
            cursor = self.cursor(part.statement.text)
            with REFUSING:
                send(cursor, part.statement, keeps_plans=True)
            self._asked.append((part, cursor))

    def say(self, text: Text) -> None:
        """Send a command whose result is only awaited."""
        self.cursor(text).execute(text)

    def wait(self) -> None:
        """Wait until the last statement is answered."""
        self._used[-1][1].fetchall()

    def read(self) -> Reply:
        """Read the server's answers."""
        reply = Reply()
        for (statement, store), cursor in self._asked:
            try:
                rows = cursor.fetchall()
            except Exception as error:
                if cursor.pgresult is None or cursor.pgresult.status != ExecStatus.TUPLES_OK:
                    raise  # the server's error
                rows = self._readable(statement, cursor, error)
            store(reply, statement.parse(rows))
        reply.unread = len(self.unread)
        self._spare.update(self._used)
        return reply

    def _readable(
        self, statement: Statement[Any], cursor: Cursor, error: Exception
    ) -> list[TupleRow]:
        """Read a claim row by row, and record the rows that cannot be read."""
        result, rows = cursor.pgresult, []
        names = [column.name for column in cursor.description or ()]
        if result is None or "ctid" not in names or statement.params is None:
            raise UnreadError(f"the server's answer could not be read: {error}") from error
        for number in range(result.ntuples):
            cursor.scroll(number, "absolute")
            try:
                rows += [row for row in [cursor.fetchone()] if row is not None]
            except Exception as problem:
                place = (result.get_value(number, names.index("ctid")) or b"").decode()
                id_ = repr(result.get_value(number, 0) or b"")[1:]
                token = cast("int", statement.params["token"])
                self.unread.append(Unread(place, token, id_, problem))
        return rows

    def cursor(self, text: Text) -> Cursor:
        """Return the cursor of a text, whose answer `wait` and `read` await."""
        cursor = self._spare.pop(text, None) or Cursor(self._connection)
        self._used.append((text, cursor))
        return cursor
