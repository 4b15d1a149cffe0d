-- Least privileges, as five group roles. Apply it after the schema, with its tables in the
-- search_path, and grant the roles to the users of your programs.

create role bgjob_producer nologin;
create role bgjob_worker nologin;
create role bgjob_scheduler nologin;
create role bgjob_operator nologin;
create role bgjob_editor nologin;

-- A producer writes jobs, also by plain SQL; these columns are promised. It learns which ids are
-- taken, and reads no payload.
grant insert (id, queue, type, arg, priority, exclusive, next_run_at, headers, expires, keep, slots)
    on bgjob_job to bgjob_producer;
-- For client.group, which alone writes this column.
grant insert (group_id) on bgjob_job to bgjob_producer;
grant select (id, queue) on bgjob_job to bgjob_producer;

-- Of requests with keep it takes the ids, also where the time of a result is over.
grant select (id, until), insert (id), update (until, value, error, queue, type, arg, attempt, token,
    created_at, ended_at) on bgjob_result to bgjob_producer;

-- Optional, for Client.result and Client.wait: a producer that may read results, and errors.
-- grant select on bgjob_result to bgjob_producer;

-- Optional, for on_conflict="replace" and debounce: a producer that may give jobs another payload.
-- grant select (token, attempt, last_error, deaths, waits, type, arg, priority, exclusive, headers,
--     expires, slots, next_run_at, created_at, updated_at, checkpoint, successor, group_id),
--     update (queue, type, arg, priority, exclusive, headers, expires, slots, next_run_at, created_at,
--     updated_at, attempt, last_error, deaths, waits, checkpoint, successor, successor_arg)
--     on bgjob_job to bgjob_producer;

-- A worker claims, settles and dead-letters jobs, and saves checkpoints. It changes no payload, and
-- reads no dead job. The insert is for jobs that were replaced while they ran
-- (on_conflict="replace").
grant select on bgjob_job to bgjob_worker;
grant insert (id, queue, type, arg, priority, exclusive, next_run_at, created_at, headers,
    expires, group_id, keep, slots) on bgjob_job to bgjob_worker;
grant update (attempt, deaths, last_error, priority, exclusive, waits, next_run_at, token,
    lease_until, updated_at, checkpoint, group_dead, slots, limited) on bgjob_job to bgjob_worker;
grant delete on bgjob_job to bgjob_worker;
grant select, delete, insert (key, place, tokens, queue, since, since_id, until, until_id, places, slots),
    update (tokens, queue, since, since_id, until, until_id, places, slots)
    on bgjob_exclusive to bgjob_worker;
grant insert (job_id, queue, type, arg, attempt, last_error, fingerprint, worker, priority, exclusive,
    next_run_at, job_created_at, job_updated_at, checkpoint, headers, expires, group_id, group_dead,
    keep, slots)
    on bgjob_dead_job to bgjob_worker;
grant select (job_id, token, job_created_at, group_id) on bgjob_dead_job to bgjob_worker;
grant select on bgjob_pause to bgjob_worker;
-- Of jobs that were enqueued with keep.
grant select, insert (id, until, value, error, queue, type, arg, attempt, token, created_at, ended_at),
    update (until, value, error, queue, type, arg, attempt, token, created_at, ended_at), delete
    on bgjob_result to bgjob_worker;
grant select, insert (scope, name, is_set), update (concurrency, rate, burst, tokens, used_at)
    on bgjob_limit to bgjob_worker;
grant select, insert (scope, name, holder, places, wanted, until), update (places, wanted, until), delete
    on bgjob_ration to bgjob_worker;

-- It writes a row for people to see it; without these it works all the same. The table has the
-- name of the role.
grant select (number, seen_at), insert (host, pid, program, release, version, queues, slots, types,
    unknown_for, lease, every), update (seen_at, state, running, counts, longest, longest_since, note), delete
    on bgjob_worker to bgjob_worker;

-- It counts what ends in each minute, unless it is told not to; also optional.
grant select, delete, insert (minute, queue, type, completed, retried, rescheduled, dead, lost,
    timed_out, cancelled, runs, run_seconds, wait_seconds, longest_run, longest_wait), update
    (completed, retried, rescheduled, dead, lost, timed_out, cancelled, runs, run_seconds,
    wait_seconds, longest_run, longest_wait) on bgjob_minute to bgjob_worker;

-- Optional, for a worker with job types that are registered with keep=True.
grant insert (day, job_id, queue, type, attempt, token), select (day) on bgjob_history to bgjob_worker;
grant truncate on bgjob_history_0, bgjob_history_1, bgjob_history_2, bgjob_history_3, bgjob_history_4,
    bgjob_history_5, bgjob_history_6, bgjob_history_7 to bgjob_worker;

-- A worker with schedules moves their ticks, and enqueues the jobs that its own code names.
grant select on bgjob_schedule to bgjob_scheduler;
grant insert (name, spec, queue, type, arg, priority, exclusive, expires, slots) on bgjob_schedule
    to bgjob_scheduler;
grant update (spec, queue, type, arg, priority, exclusive, expires, slots, tick, last_run_at,
    last_job_id, next_run_at) on bgjob_schedule to bgjob_scheduler;
grant insert (id, queue, type, arg, priority, exclusive, expires, slots) on bgjob_job
    to bgjob_scheduler;
grant select (id) on bgjob_job to bgjob_scheduler;

-- An operator reads everything, also for bgjob preflight, requeues and purges dead jobs, and pauses
-- queues. It changes no live job.
grant select on bgjob_job, bgjob_dead_job, bgjob_exclusive, bgjob_pause, bgjob_limit, bgjob_ration,
    bgjob_worker, bgjob_minute, bgjob_history, bgjob_result
    to bgjob_operator;
-- Where a requeued job had keep, its result is pending again.
grant insert (id), update (until, value, error, queue, type, arg, attempt, token, created_at, ended_at)
    on bgjob_result to bgjob_operator;
grant insert (id, queue, type, arg, last_error, priority, exclusive, next_run_at, created_at,
    checkpoint, headers, expires, group_id, group_dead, keep, slots) on bgjob_job to bgjob_operator;
-- The update is for its locks: a job is locked before it is moved or purged. No role can write
-- this column.
grant update (id), delete on bgjob_dead_job to bgjob_operator;
grant insert, update, delete on bgjob_pause to bgjob_operator;
grant insert (scope, name, is_set, concurrency, rate, burst), update (is_set, concurrency, rate, burst)
    on bgjob_limit to bgjob_operator;

-- An operator pauses, resumes and removes schedules, and runs them once.
grant select, delete on bgjob_schedule to bgjob_operator;
grant update (paused, tick, next_run_at) on bgjob_schedule to bgjob_operator;

-- An editor looks at live jobs, and cancels, abandons, hastens and reorders them. It changes no
-- payload and claims nothing. Where a job leaves its exclusive key, it wakes the next one (waits).
grant select, update (priority, next_run_at, waits, updated_at), delete on bgjob_job to bgjob_editor;
grant select, insert (key), update (since_id), delete on bgjob_exclusive to bgjob_editor;
grant select (job_id), insert (job_id, queue, type, arg, attempt, last_error, fingerprint, priority,
    exclusive, next_run_at, job_created_at, job_updated_at, token, checkpoint, headers, expires,
    group_id, group_dead, keep, slots) on bgjob_dead_job to bgjob_editor;
grant select, insert (id, until, value, error, queue, type, arg, attempt, token, created_at, ended_at),
    update (until, value, error, queue, type, arg, attempt, token, created_at, ended_at)
    on bgjob_result to bgjob_editor;
grant select on bgjob_worker to bgjob_editor;

-- Optional: `bgjob doctor` names a culprit without it. With it, it also shows what the sessions of
-- other roles run, and since when.
-- grant pg_read_all_stats to bgjob_operator;
