"""A whole payload, as a file."""

from starlette.exceptions import HTTPException
from starlette.responses import Response

from bgjob.ext.web.pages.dead import dead_of_number
from bgjob.ext.web.pages.workers import number_in
from bgjob.ext.web.records import check_reading, record
from bgjob.ext.web.redaction import Shown
from bgjob.ext.web.views import Done
from bgjob.ext.web.visit import Visit


async def payload(visit: Visit) -> Response:
    """Return the payload of a live job."""
    id_ = visit.name("id")
    job = await visit.site.reader.jobs.get(id_)
    if job is None:
        raise HTTPException(404, f"There is no live job {id_!r}.")
    return await _file(visit, Shown(id_, job.queue, job.type, job.arg))


async def payload_of_dead(visit: Visit) -> Response:
    """Return the payload of a dead job."""
    job = await dead_of_number(visit, number_in(visit, "number"))
    return await _file(visit, Shown(job.id, job.queue, job.type, job.arg))


async def _file(visit: Visit, shown: Shown) -> Response:
    check_reading(visit, "payloads")
    redaction = visit.site.redaction
    if redaction.payloads == "hide":
        raise HTTPException(403, "This page shows no payloads.")
    left = redaction.of(shown)
    if left is None or left.arg is None:
        raise HTTPException(404, "This job has no payload, or none that may be seen.")
    await record(
        visit,
        "download payload",
        Done(f"the payload of job {shown.id} was downloaded", 1, (shown.id,)),
    )
    headers = {"content-disposition": 'attachment; filename="payload"'}
    return Response(left.arg, media_type="application/octet-stream", headers=headers)
