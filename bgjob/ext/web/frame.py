"""What is the same around every page: names, links, permissions."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias, get_args
from urllib.parse import quote, urlencode

from bgjob.stats import CappedCount

Permission: TypeAlias = Literal[
    "look", "payloads", "jobs", "abandon", "pause", "limits", "requeue", "purge", "schedules"
]
"""`look`: see the pages. `payloads`: unmask and download payloads. `jobs`: cancel a job, run it
now, change its priority. `abandon`: give up a running job whose handler runs on. `pause`: pause and
resume queues. `limits`: set and remove limits of queues and types.
`requeue`, `purge`: dead jobs. `schedules`: run, pause, resume and remove schedules."""

PERMISSIONS: frozenset[Permission] = frozenset(get_args(Permission))

READING: frozenset[Permission] = frozenset({"look", "payloads"})
"""The permissions that change nothing."""

Colour: TypeAlias = Literal["grey", "blue", "green", "orange", "red", "purple"]

COLOURS: tuple[Colour, ...] = get_args(Colour)

Section: TypeAlias = Literal["overview", "jobs", "dead", "limits", "schedules", "workers", "doctor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What every template gets as `page`.

    Attributes:
        title: the page's title and only h1.
        name: the name of the installation, such as "production".
        colour: its colour; a class in the style sheet.
        version: the version of bgjob.
        root: the prefix of every link; empty, or such as "/bgjob".
        static: the prefix of the files in static/; it changes with their content.
        here: path and query of this page, for a form's field `next`; for a part it is the
            page's.
        nav: the entry of the navigation that is current; None for none.
        user: the user's name; None if no one is signed in, or everyone may look.
        can: the permissions; none that changes something if the page is read-only.
        is_read_only: whether nothing can be changed here, by any user.
        is_part: whether only a part is drawn, to replace its element: then ages are not
            drawn as text, so that the part stays the same for its ETag.
        now: the time of the database's clock, or of this host's if it was not asked.
        dead_last_hour: the badge of "Dead"; None if it is not known.
        lost_workers: the badge of "Workers".
        notice: what was done, after an action; None without one.
        is_wrong: whether the notice is that it was not done.
        database: the name of the database, if the page is over several.

    """

    title: str
    name: str
    colour: Colour
    version: str
    root: str
    static: str
    here: str
    nav: Section | None
    user: str | None
    can: AbstractSet[str]
    is_read_only: bool
    is_part: bool
    now: datetime
    dead_last_hour: CappedCount | None = None
    lost_workers: int = 0
    notice: str | None = None
    is_wrong: bool = False
    database: str = ""

    @property
    def home(self) -> str:
        """The address of the first page; over several databases, of the page of all."""
        return self.root.removesuffix(f"/{self.database}" if self.database else "") + "/"

    def url(self, *parts: object, **query: object) -> str:
        """Return the address of a page, such as `url("queues", name, part="now")`.

        Parts are escaped, so that any name returns as it was; query fields that are None or
        empty are left out.
        """
        return self.root + path(*parts, **query)


def path(*parts: object, **query: object) -> str:
    """Return the path of a page below the root; see Frame.url."""
    given = {name.rstrip("_"): value for name, value in query.items() if value not in (None, "")}
    return "/" + "/".join(map(_segment, parts)) + ("?" + urlencode(given) if given else "")


def _segment(part: object) -> str:
    # A browser resolves "." and ".." even if they are escaped, and the address of a payload ends
    # like a name may end. Such names stand between tildes, and so do those that begin with one.
    text = str(part)
    is_special = text.startswith("~") or text in {".", ".."} or text.endswith("/payload")
    return quote(f"~{text}~" if is_special else text, safe="")


def original(segment: str) -> str:
    """Return the name that a segment of a path stands for; the path is unquoted already."""
    is_special = len(segment) > 2 and segment[0] == segment[-1] == "~"  # noqa: PLR2004
    return segment[1:-1] if is_special else segment
