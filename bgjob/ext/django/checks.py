"""System checks of the setting BGJOB."""

from typing import Any

from django.core.checks import CheckMessage, Error, Warning, register  # noqa: A004
from django.db import connections

from bgjob.ext.django._settings import problems


def check_setting(**_: Any) -> list[CheckMessage]:
    """Report what is wrong with the setting, and whether no database can hold jobs."""
    found: list[CheckMessage] = [Error(text, id=f"bgjob.{number}") for number, text in problems()]
    if all(connections[alias].vendor != "postgresql" for alias in connections):
        found.append(
            Warning(
                "no database of DATABASES is PostgreSQL, which bgjob needs",
                hint="Without one nothing can be enqueued, and no worker runs.",
                id="bgjob.W001",
            )
        )
    return found


register(check_setting, "bgjob")
