"""The doctor, who is asked on request only."""

from datetime import datetime
from time import monotonic

from bgjob.doctor import Finding
from bgjob.ext.web.views import DoctorPage, FindingRow
from bgjob.ext.web.visit import Visit, tried

_KEPT = 30.0
"""Seconds for which an answer is kept: some of its statements read a table once."""

_PATIENCE = 60.0
"""Seconds: its some 30 statements may take 5 s each."""

_ORDER = ("bad", "warn", "note", "ok")


async def doctor(visit: Visit) -> DoctorPage:
    """Return the findings, if they are asked for."""
    if not visit.field("run"):
        return DoctorPage()

    async def ask() -> tuple[list[Finding], datetime, float]:
        start = monotonic()
        findings = await visit.site.reader.doctor()
        return findings, visit.site.now, monotonic() - start

    found = await tried(visit.site.keep("doctor", ask, at_least=_KEPT), within=_PATIENCE)
    if not isinstance(found, tuple):
        return DoctorPage(found)
    findings, at, seconds = found
    text = visit.site.redaction.text
    rows = [FindingRow(f.check, f.severity, text(f.text), f.remedy) for f in findings]
    rows.sort(key=lambda row: _ORDER.index(row.severity))
    return DoctorPage(tuple(rows), at, seconds)
