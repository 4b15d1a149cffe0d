"""The logger `bgjob`, which a configuration that does not name it cannot disable."""

import logging
from collections.abc import MutableMapping
from typing import Any

from typing_extensions import override


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """Log to a logger, and enable it again if it was disabled.

    logging.config's fileConfig and dictConfig disable the loggers that they do not name, by
    default: after Alembic's stock env.py dead jobs were no longer logged. Levels, filters and
    handlers work as for any logger: to silence this one, set its level.
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
        return msg, kwargs  # keep the call's `extra`


log = _Logger(logging.getLogger("bgjob"), {})
"""The library's own logger."""
