"""The link from a job to its trace, in the tool that shows traces."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from bgjob.ext.web.parts import Trace

_PLACE = "{trace_id}"

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_LONGEST = 512

_NONE = "0" * 32


def check_template(template: str) -> None:
    """Raise ValueError unless it is the address of a trace."""
    try:
        parts = urlsplit(template)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname)
        # Not in the name of the host: a header would choose where the link leads.
        is_fixed = _PLACE not in parts.scheme + parts.netloc
    except ValueError:
        is_address = is_fixed = False
    if not (
        is_address
        and is_fixed
        and _PLACE in template
        and template.isprintable()
        and " " not in template
    ):
        raise ValueError(
            "trace_url must be an address with http or https and the place of the trace's id, such "
            f"as https://traces.example.com/trace/{_PLACE}, not {template!r}"
        )


def trace_of(headers: Mapping[str, Any], template: str) -> Trace | None:
    """Return the link of a job whose headers have a trace's context, if there is a template."""
    context = headers.get("traceparent")
    if not (template and isinstance(context, str) and len(context) <= _LONGEST):
        return None
    found = _TRACEPARENT.fullmatch(context)
    if found is None or found[1] == _NONE:
        return None
    return Trace(found[1], template.replace(_PLACE, found[1]))
