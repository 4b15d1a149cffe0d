"""Groups: a job that runs when no job of its group is live any more.

A group has no row of its own, and no counter. Its jobs have its id, which is the id of the job that
runs afterwards, `then`. That job is written together with them, and its due time is infinite: no
claim finds it, nor does anything that looks for the next due job. A settlement does nothing for a
group. After the commit of one that ended jobs of a group, and at each full look at the queue of
`then`, the worker asks whether a job of the group is live. If none is, it makes `then` due.

Of two workers that settle the last two jobs at the same time, the one that asks last sees neither.
Both may see none: then the row's lock lets one of them make it due, and the other one finds it due.
Nothing has to be locked for that, since a job joins a group in one of two ways: in the transaction
that writes `then`, or while another job of the group is kept live (`hold`).
"""

from collections.abc import Collection
from typing import LiteralString

from bgjob._sql.enqueues import enqueue_many
from bgjob._sql.notices import BY_HAND, NOTIFY
from bgjob._sql.statement import Statement, as_text, text_array
from bgjob.job import EnqueueRequest

WAITS_FOR_GROUP: LiteralString = "coalesce(j.group_id, '') = j.id and j.next_run_at = 'infinity'"
"""Whether job `j` is one that runs after its group, and is not due yet; never null.

Where the condition implies that a job has a group, the planner of PostgreSQL 15 may read the whole
index of groups, instead of the primary key."""

# From the last id, because ids are in the order of time: the dead rows of jobs that have ended come
# after those that are live. As bounds of a range: with an equation, the planner may follow the
# primary key, whose order is the same, past all jobs.
IS_OVER: LiteralString = """
    (
        select true from bgjob_job m
        where m.group_id >= j.id and m.group_id <= j.id and m.id <> j.id
        order by m.group_id desc, m.id desc limit 1
    ) is null
"""
"""Whether no job of the group of `then`, the job `j`, is live."""


def open_group(then: EnqueueRequest) -> Statement[set[str]]:
    """Write the job that runs after its group, before the group's; no id if its id is taken."""
    return enqueue_many([then], notify=False, group=then.id, waits_for_group=True)


def hold(id_: str, group: str) -> Statement[bool]:
    """Keep a job of a group live until the transaction ends; False if it is not live any more.

    Its settlement waits for that. So a transaction that does not see this job any more sees those
    that are added to the group.
    """
    return Statement(
        """
        select true from bgjob_job where id = %(id)s and group_id = %(group)s for key share
        """,
        {"id": id_, "group": group},
        bool,
        prepare=None,
    )


_TELL: LiteralString = NOTIFY.format(channel=f"'{BY_HAND}'", payload="queue")

# The number of those that died is exact: a job leaves one table and enters the other in one commit,
# and this statement reads both at the same moment. A job that died before the group was written
# belongs to an earlier one with the same id.
_END: LiteralString = f"""
    update bgjob_job g
    set next_run_at = clock_timestamp(),
        updated_at = clock_timestamp(),
        group_dead = (
            select count(distinct d.job_id) from bgjob_dead_job d
            where d.group_id = g.id and d.job_id <> g.id and d.job_created_at >= g.created_at
        )
    where g.ctid = any (array(
        select j.ctid from bgjob_job j
        where j.id = any (%(ids)s::text[]) and {WAITS_FOR_GROUP} and {IS_OVER}
        for update skip locked
    ))
    returning {as_text("id")}
"""
_END_AND_TELL: LiteralString = f"{_END}, {_TELL}"


def end_groups(ids: Collection[str], *, notify: bool) -> Statement[list[str]]:
    """Make the jobs due that waited for these groups, if those are over; return their ids.

    Run it after the commit that ended jobs of the groups. It waits for no lock: a job that another
    session has locked is left to the next full look at its queue.
    """
    return Statement(
        _END_AND_TELL if notify else _END,
        {"ids": text_array(sorted(ids))},
        lambda rows: [row[0] for row in rows],
    )
