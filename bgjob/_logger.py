"""The logger `bgjob`, which no configuration silences that does not know it."""

import logging
from collections.abc import MutableMapping
from typing import Any

from typing_extensions import override


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """Logs to a logger that is enabled again where it was disabled.

    logging.config's fileConfig and dictConfig disable the loggers that they do not name, by
    default: after Alembic's stock env.py no dead job was logged any more. Levels, filters and
    handlers count as for any logger: its level silences it.
    """

    @override
    def isEnabledFor(self, level: int) -> bool:
        if self.logger.disabled:
            self.logger.disabled = False
        return self.logger.isEnabledFor(level)

    @override
    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, kwargs  # with the `extra` of the call


log = _Logger(logging.getLogger("bgjob"), {})
"""The library's own logger."""
