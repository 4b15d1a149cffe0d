"""Who may see the page, and what each may do."""

from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeAlias

from starlette.requests import Request

from bgjob.ext.web.frame import PERMISSIONS, Permission


@dataclass(frozen=True, slots=True)
class Access:
    """What one user may do.

    Attributes:
        user: the user's name, for the page, the log and `on_action`.
        permissions: the permissions; all by default. Without `look` the user sees nothing.

    Raises:
        ValueError: there is no such permission.

    """

    user: str
    permissions: AbstractSet[Permission] = PERMISSIONS

    def __post_init__(self) -> None:
        check_permissions(self.permissions)


Check: TypeAlias = Callable[[Request], "Awaitable[Access | None] | Access | None"]
"""Returns what the user of a request may do, or None if the user is not known."""


def check_permissions(permissions: AbstractSet[str]) -> None:
    """Raise ValueError that names what is not a permission."""
    if unknown := sorted(permissions - PERMISSIONS):
        raise ValueError(
            f"{unknown[0]!r} is not a permission; there are {', '.join(sorted(PERMISSIONS))}"
        )
