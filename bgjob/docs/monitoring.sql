-- How much waits, and for how long?
select queue, type, count(*) as due, now() - min(next_run_at) as oldest
from bgjob_job
where next_run_at <= now() and (lease_until is null or lease_until <= now())
group by queue, type;

-- What runs, on which attempt? What was claimed by a worker that is gone has a lease in the past.
select queue, type, id, attempt, lease_until from bgjob_job where lease_until is not null;

-- What was in flight when its worker died? That many times in a row. From two on it is a suspect.
select queue, type, id, attempt, deaths from bgjob_job where deaths > 0;

-- What waits for an exclusive key?
select exclusive, queue, count(*) from bgjob_job where waits group by exclusive, queue;

-- What fails?
select queue, type, attempt, last_error, next_run_at from bgjob_job where last_error is not null;

-- What is dead?
select queue, type, job_id, attempt, last_error, moved_at from bgjob_dead_job order by id desc;
