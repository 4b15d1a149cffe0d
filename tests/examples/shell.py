import os

import psycopg

from bgjob import EnqueueRequest, Schedule, Schedules
from bgjob.cli import main

daily = Schedule(
    "daily", every=86400, request=EnqueueRequest("reports", "report", exclusive="report")
)
with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as conn:
    Schedules([daily]).run(conn)  # a worker with services=[Schedules([daily])] does it

main(["schedules", "pause", "daily"])
main(["schedules", "resume", "daily"])
main(["enqueue", "reports", "report", "--id", "by hand", "--exclusive", "report"])
main(["pause", "reports"])
main(["paused"])
main(["resume", "reports", "--json"])
main(["schedules", "remove", "daily"])
