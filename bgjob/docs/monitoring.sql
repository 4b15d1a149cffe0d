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

-- Which workers have died without a word, or are cut off?
select number, host, pid, program, release, now() - seen_at as not_seen, note
from bgjob_worker
where state in ('working', 'stopping') and seen_at < now() - 3 * every * interval '1 second';

-- Which worker runs a job, and since when? The token of its claim tells both.
select j.queue, j.type, j.id, w.host, w.pid, w.release,
    to_timestamp((j.token >> 21) / 1000.0 + 1577836800) as since
from bgjob_job j
left join bgjob_worker w on (j.token & 2097151) = w.number % 1048576
where j.token is not null
order by since;

-- How many jobs wait for an exclusive key?
select exclusive, queue, count(*) from bgjob_job where waits group by exclusive, queue;

-- Which jobs are failing?
select queue, type, attempt, last_error, next_run_at from bgjob_job where last_error is not null;

-- Which jobs are dead?
select queue, type, job_id, attempt, last_error, moved_at from bgjob_dead_job order by id desc;

-- How did they die? The groups of bgjob triage, the largest first.
select lpad(to_hex(fingerprint), 12, '0') as fingerprint, count(*) as jobs, min(type) as type,
    min(moved_at) as first, max(moved_at) as last
from bgjob_dead_job group by bgjob_dead_job.fingerprint order by jobs desc limit 100;
