"""The log of a process that serves a worker."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

import orjson
from typing_extensions import override

Format = Literal["text", "json"]

_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: an object.

    Its members are `time` (ISO 8601, UTC), `level`, `logger`, `pid`, `message`, those of the
    record's `extra` (`job_id`, `job_queue`, `job_type` and `job_attempt` if it concerns a
    job) and `exception`, the traceback's text, if there is an exception.
    """

    @override
    def format(self, record: logging.LogRecord) -> str:
        value: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        value = {k: v for k, v in vars(record).items() if k not in _STANDARD} | value
        if record.exc_info:
            value["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
        except TypeError:  # surrogates, or integers of more than 64 bits
            return json.dumps(value, default=str)


def set_up(level: str | None, format: Format | None, *, with_pid: bool = False) -> None:  # noqa: A002
    """Log to stderr, unless the program has set up logging itself.

    Args:
        level: the lowest level to show; None for INFO, so that retries and errors are shown, or
            for the program's own level. A given level always applies.
        format: None for text, or for the program's own setup: records that another logger's
            handler has shown are not shown again. A given format replaces the program's own
            handlers, and those of other loggers that write to the terminal.
        with_pid: whether lines of text contain the process id, because several processes write
            to the same place.

    """
    root = logging.getLogger()
    if format is not None or not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(
            JsonFormatter()
            if format == "json"
            else logging.Formatter(
                f"%(asctime)s {'%(process)d ' if with_pid else ''}%(levelname)s %(message)s"
            )
        )
        if format is None:
            handler.addFilter(_is_unhandled)
        else:
            _remove_handlers()
        own = root.level if root.handlers else logging.INFO
        logging.basicConfig(level=level or own, handlers=[handler], force=True)
    elif level is not None:
        root.setLevel(level)


def _is_unhandled(record: logging.LogRecord) -> bool:
    """Whether no logger below the root has its own handler that shows a record.

    The program has set those up, and the line would appear twice.
    """
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None and logger.parent is not None:
        for handler in logger.handlers:
            is_shown = not isinstance(handler, logging.NullHandler | logging.FileHandler)
            if is_shown and handler.level <= record.levelno:
                return False
        logger = logger.parent
    return True


def _remove_handlers() -> None:
    """Remove the terminal handlers of loggers below the root."""
    for logger in logging.Logger.manager.loggerDict.values():
        for handler in list(getattr(logger, "handlers", ())):
            if getattr(handler, "stream", None) in (sys.stdout, sys.stderr):
                logger.removeHandler(handler)  # type: ignore[union-attr]


def as_json(message: str, error: BaseException | None) -> str:
    """Return the last message of a process as a line of JSON."""
    record = logging.makeLogRecord(
        {
            "name": "bgjob",
            "levelno": logging.CRITICAL,
            "levelname": "CRITICAL",
            "msg": message,
            "exc_info": error and (type(error), error, error.__traceback__),
        }
    )
    return JsonFormatter().format(record)
