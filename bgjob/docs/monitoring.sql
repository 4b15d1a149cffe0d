-- Queries for monitoring, for the owner of the tables or the role bgjob_operator.

-- How many jobs are due, and for how long?
select queue, type, count(*) as due, now() - min(next_run_at) as oldest
from bgjob_job
where next_run_at <= now() and (lease_until is null or lease_until <= now())
group by queue, type;

-- Which jobs are running, on which attempt? A lease in the past is that of a worker that is gone.
select queue, type, id, attempt, lease_until from bgjob_job where lease_until is not null;

-- Which jobs were in flight when their worker died, how many times in a row? From two on a job is
-- a suspect.
select queue, type, id, attempt, deaths from bgjob_job where deaths > 0;

-- How many jobs wait for an exclusive key?
select exclusive, queue, count(*) from bgjob_job where waits group by exclusive, queue;

-- Which jobs are failing?
select queue, type, attempt, last_error, next_run_at from bgjob_job where last_error is not null;

-- Which jobs are dead?
select queue, type, job_id, attempt, last_error, moved_at from bgjob_dead_job order by id desc;
