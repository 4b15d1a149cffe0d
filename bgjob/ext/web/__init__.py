"""The web page: see and steer the queues in a browser.

It needs the extra `web`: `pip install "bgjob[web]"`. `bgjob web` runs it; `create_app` makes an
ASGI application of it, to mount in a program of your own.

    app       create_app: one request after the other
    apps      WebApps: one page over several databases, each with an app of its own
    guard     headers, hosts, sizes, origins: what each request has to pass
    access    who may do what; schemes, users: ready-made ways to know the user
    routes    the addresses
    pages/    what is looked at: each page is a function from a Visit to a view
    actions/  what is changed: each is wrapped by `action`, which checks the permission
    views     what each page shows, as values: for a template, and for JSON; parts: rows of them
    redaction what is shown of payloads and errors
    site      connections, settings, and `kept`: answers that all viewers share
    answers   a view as HTML or JSON, an error, a redirect

- No page costs more than a few hundred milliseconds of one connection, whatever the tables hold:
  every number is capped, every list has an end, and each statement has 2 s.
- Numbers that all viewers see are asked for once, and kept for 2 s or forty times as long as they
  took.
- Nothing in the page parses what is in the database, except JSON up to 20 kB.
- A page works without JavaScript. The script only fetches parts again, which are files of their
  own among the templates (`?part=`).
"""

from bgjob.ext.web.access import Access
from bgjob.ext.web.app import WebApp, create_app
from bgjob.ext.web.apps import WebApps
from bgjob.ext.web.redaction import Shown
from bgjob.ext.web.schemes import Anyone, ProxyAccess, TokenAccess
from bgjob.ext.web.users import UsersAccess, UsersError

__all__ = [
    "Access",
    "Anyone",
    "ProxyAccess",
    "Shown",
    "TokenAccess",
    "UsersAccess",
    "UsersError",
    "WebApp",
    "WebApps",
    "create_app",
]
