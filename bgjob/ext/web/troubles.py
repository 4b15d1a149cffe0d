"""Errors as pages: what happened, and what to do."""

import logging

import psycopg
from psycopg import errors
from starlette.exceptions import HTTPException

from bgjob.errors import BgjobError, SchemaError
from bgjob.ext.web.views import ErrorPage
from bgjob.ext.web.visit import trouble_of

_logger = logging.getLogger("bgjob.web")

_TITLES = {
    400: "This cannot be understood",
    401: "Not signed in",
    403: "Not allowed",
    404: "Not found",
    405: "Not possible here",
    409: "Not done",
    413: "Too much at once",
    415: "Not a form",
    421: "Not this host",
}

_REMEDIES = {
    421: "Start the page with --host NAME for each name that it has.",
}


def of(error: Exception) -> tuple[ErrorPage | None, dict[str, str]]:
    """Return the page for an error and its headers; no page for a redirect."""
    match error:
        case HTTPException(status_code=status) if 300 <= status < 400:  # noqa: PLR2004
            return None, dict(error.headers or {})
        case HTTPException(status_code=status):
            title = _TITLES.get(status) or str(error.detail)
            text = str(error.detail) if status in _TITLES else ""
            if status == 405:  # noqa: PLR2004
                text = "There is nothing here for this method."
            page = ErrorPage(status, title, text, _REMEDIES.get(status, ""))
            return page, dict(error.headers or {})
        case SchemaError():
            return (
                ErrorPage(
                    503,
                    "The tables are not as they should be",
                    str(error),
                    "Apply this with your migration tool:",
                    "bgjob schema",
                ),
                {},
            )
        case errors.ReadOnlySqlTransaction():
            text = "The server is a standby, or became one: nothing can be changed here."
            return ErrorPage(403, _TITLES[403], text), {}
        case errors.InsufficientPrivilege():
            return (
                ErrorPage(
                    403,
                    "The page's role may not do this",
                    f"{error.diag.message_primary}.",
                    "Give it what privileges.sql gives to bgjob_operator, and to bgjob_editor for "
                    "live jobs.",
                ),
                {},
            )
        case psycopg.Error() if (trouble := trouble_of(error)) is not None:
            return ErrorPage(503, trouble.text.rstrip("."), "", trouble.remedy), {}
        case psycopg.OperationalError():
            _logger.warning("the page got no answer from the database: %s", error)
            return (
                ErrorPage(
                    503,
                    "The database does not answer",
                    "The page tries again with the next request.",
                    "The log of the page has the error.",
                ),
                {},
            )
        case psycopg.DataError():  # such as a time in the address that is none
            return ErrorPage(400, _TITLES[400], f"{error.diag.message_primary}."), {}
        case BgjobError() | ValueError():
            _logger.info("not done", exc_info=error)
            return ErrorPage(
                409 if isinstance(error, BgjobError) else 400, "Not done", str(error)
            ), {}
    _logger.error("the page failed", exc_info=error)
    return (
        ErrorPage(500, "The page failed", "This is a bug.", "The log of the page has the error."),
        {},
    )
