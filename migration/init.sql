-- bgjob, schema version 1. Apply it with your migration tool, in any schema:
-- bgjob finds its tables through search_path.

create table bgjob_job (
    -- The type limits the length. A check constraint would be evaluated again at each claim,
    -- which is a tenth of a claim's cost on the server. Collation "C" compares bytes: with the
    -- rules of a language a delete of a job costs a tenth more.
    -- An insert without an id gets a UUID of version 7, as bgjob makes them: 48 bits of
    -- milliseconds, 12 of their fraction, and the end of a random one.
    id          varchar(255) collate "C" not null default overlay(overlay(
        lpad(to_hex((extract(epoch from clock_timestamp()) * 4096000)::bigint), 15, '0')
        placing '-7' from 13 for 0) placing '-' from 9 for 0) || substr(gen_random_uuid()::text, 19),
    queue       varchar(255) collate "C" not null,
    type        varchar(255) not null,
    arg         bytea,
    attempt     integer     not null default 0,
    last_error  text,
    priority    smallint    not null default 0,
    -- The number of workers in a row that died, or lost the lease, while they held
    -- the job. From two on the job is a suspect: claimed in smaller and smaller groups,
    -- and finally alone.
    deaths      smallint    not null default 0,
    -- Of the jobs with the same key one runs at a time. Jobs that were claimed while
    -- another one held the key have waits = true, so that no claim finds them, until
    -- the key is free.
    exclusive   varchar(255) collate "C",
    waits       boolean     not null default false,
    -- With waits: the job is due and its type has a limit, for which it waits. A claim that met it
    -- has put it aside, so that the next ones meet other types.
    limited     boolean     not null default false,
    next_run_at timestamptz not null default clock_timestamp(),
    -- The claim: which one holds the job, and until when. No index may cover these
    -- two columns or attempt, so that claims and extensions are heap-only updates,
    -- for which the fillfactor leaves room in the page. Measured against a lease in
    -- next_run_at: 445 bytes of WAL a job instead of 698.
    token       bigint,
    lease_until timestamptz,
    created_at  timestamptz not null default clock_timestamp(),
    updated_at  timestamptz not null default clock_timestamp(),
    -- A small object beside the payload. Not jsonb, which the server would have to turn into text
    -- for each claim. The last columns: no condition has to step over them.
    headers     json,
    -- If it is claimed later, it is not run. Nothing searches for it.
    expires     timestamptz,
    -- The newest request that replaced the job while it ran; its end writes it as a fresh job.
    successor   json,
    successor_arg bytea,
    -- What the handler has saved; see bgjob.checkpoint. No index may cover it, so that a save is a
    -- heap-only update.
    checkpoint  bytea,
    -- The id of the job that runs when no job of the group is live any more. That job has its own
    -- id here, and is never due (infinity) before. Then it is told how many jobs died.
    group_id    varchar(255) collate "C",
    group_dead  integer,
    -- For how many seconds after its end the job's row in bgjob_result stays.
    keep        double precision,
    -- How many jobs of its key may run at once. Null: one.
    slots       smallint,
    constraint bgjob_job_pkey primary key (id),
    constraint bgjob_job_id_check check (id <> ''),
    constraint bgjob_job_queue_check check (queue <> ''),
    constraint bgjob_job_type_check check (type <> ''),
    constraint bgjob_job_exclusive_check check (exclusive <> '')
) with (
    -- A claim makes a row 16 bytes longer, so half-filled pages have no room for the last
    -- few rows. Measured: the claim and the delete of a job wrote 357 bytes of WAL at 45, where
    -- every claim is heap-only; 450 at 50 (94 % heap-only), 658 at 70 (40 %), 776 at 100
    -- (3 %). Its enqueue wrote 381 bytes at each of them.
    fillfactor = 45,
    -- To return the pages of a drained queue to the file system, vacuum blocks all claims:
    -- the longest claim meanwhile took 27 to 38 ms, and 5 to 10 ms without it. The next burst
    -- of jobs uses the pages.
    vacuum_truncate = off
    -- Other thresholds for autovacuum, and no cost delay, made no measurable difference.
);

-- Every claim finds its rows here, in the order in which it takes them.
create index bgjob_job_due on bgjob_job (queue, priority, next_run_at) where not waits;

-- The suspects, those with the most deaths first; rarely more than a few. A query in this
-- order cannot use the index above. Without the order, and with statistics of a smaller table,
-- the planner chose that one: to find no suspect among 250,000 due jobs took 100 ms.
create index bgjob_job_suspect on bgjob_job (queue, deaths desc, priority, next_run_at)
    where deaths > 1 and not waits;

-- The jobs of a key, and those of them that wait, in the order in which they run.
create index bgjob_job_exclusive on bgjob_job (exclusive, waits, queue, next_run_at, id)
    where exclusive is not null;

-- The jobs that wait for the limit of their type, in the order in which they are claimed.
create index bgjob_job_limited on bgjob_job (queue, type, priority, next_run_at)
    where limited and waits;

-- The jobs of a group. Ids are in the order of time: the last ones live the longest, so one that
-- lives is found from that end without the dead rows of those that have ended.
create index bgjob_job_group on bgjob_job (group_id, id) where group_id is not null;

-- The keys that jobs hold or wait for. A statement that changes a key or its jobs locks the
-- key's first row, and reads the jobs afterwards.
create table bgjob_exclusive (
    key      text     not null,
    -- The claims of one worker that may hold the key. They do while a job of the key and this queue
    -- has one of their tokens, from the first due time and id to the last.
    tokens   bigint[],
    queue    text,
    -- The jobs of this queue that wait for the key come after the first, so the search for the
    -- next one starts there, and not among the dead rows that an old snapshot keeps. Null: unknown.
    since    timestamptz,
    since_id text,
    until    timestamptz,
    until_id text,
    -- 0 for the first row. A key of several slots may have several holders, each with its row.
    place    smallint not null default 0,
    -- How many of these jobs the worker may run at once, and the smallest number of slots of one.
    places   smallint not null default 1,
    slots    smallint not null default 1,
    constraint bgjob_exclusive_pkey primary key (key, place)
) with (fillfactor = 45);

create table bgjob_dead_job (
    id             bigint      generated always as identity,
    job_id         text        not null,
    queue          text        not null,
    type           text        not null,
    arg            bytea,
    attempt        integer     not null,
    last_error     text,
    priority       smallint    not null,
    exclusive      text,
    next_run_at    timestamptz not null,
    job_created_at timestamptz not null,
    job_updated_at timestamptz not null,
    moved_at       timestamptz not null default clock_timestamp(),
    -- Jobs that died in the same way have the same: of the type, the error's class, the place in
    -- the program and the first line without values. The worker that has the exception makes it,
    -- because the text tells less, and grouping a million texts takes 4 to 7 s. 0: unknown.
    fingerprint    bigint      not null default 0,
    -- The number of the worker's row, as in its tokens; null if it had none.
    worker         integer,
    -- The claim that a cancel has ended, so that its worker can tell that from a lost lease.
    token          bigint,
    headers        json,
    expires        timestamptz,
    checkpoint     bytea,
    group_id       text collate "C",
    group_dead     integer,
    keep           double precision,
    slots          smallint,
    constraint bgjob_dead_job_pkey primary key (id)
);

-- Not unique: a job that was requeued, or enqueued again with its id, may die again.
create index bgjob_dead_job_job_id on bgjob_dead_job (job_id);

-- The jobs of a group in the order of their death, and all groups without the table: 30 MB for a
-- million dead jobs.
create index bgjob_dead_job_fingerprint on bgjob_dead_job (fingerprint, id);

-- The dead jobs of a group.
create index bgjob_dead_job_group on bgjob_dead_job (group_id, job_id) where group_id is not null;

-- One row for each schedule. The worker that moves its tick forward enqueues the jobs.
create table bgjob_schedule (
    name        text        not null,
    spec        text        not null,
    queue       text        not null,
    type        text        not null,
    arg         bytea,
    priority    smallint    not null,
    exclusive   text,
    -- Seconds after its enqueue at which a job expires.
    expires     double precision,
    -- The last tick that was enqueued or skipped.
    tick        timestamptz not null default clock_timestamp(),
    -- The last tick for which a job was enqueued, and that job.
    last_run_at timestamptz,
    last_job_id text,
    next_run_at timestamptz,
    paused      boolean     not null default false,
    slots       smallint,
    constraint bgjob_schedule_pkey primary key (name)
);

-- The queues from which nothing is claimed, and until when.
create table bgjob_pause (
    queue text        not null,
    until timestamptz not null default 'infinity',
    constraint bgjob_pause_pkey primary key (queue)
);

-- How many jobs of a queue or of a type may run at once, or start in a time, over all workers.
create table bgjob_limit (
    scope       text collate "C" not null,
    name        text collate "C" not null,
    -- An operator has set it, for all workers. Otherwise it is what a program had in its code when it
    -- last used it, and binds the workers of that program.
    is_set      boolean not null,
    concurrency integer,
    -- Starts a second, and how many may come at once.
    rate        double precision,
    burst       integer,
    -- How many jobs may start now, when that was last counted. Null: as many as ever.
    tokens      double precision,
    used_at     timestamptz not null default clock_timestamp(),
    constraint bgjob_limit_pkey primary key (scope, name),
    constraint bgjob_limit_scope_check check (scope in ('queue', 'type'))
) with (fillfactor = 25);

-- The places of a limit that workers have taken. Those of a dead worker are free after `until`, when
-- the lease of no job that it ran can last.
create table bgjob_ration (
    scope  text collate "C" not null,
    name   text collate "C" not null,
    -- A token of the worker; see bgjob._sql.tokens.
    holder bigint      not null,
    places integer     not null,
    wanted integer     not null,
    until  timestamptz not null,
    constraint bgjob_ration_pkey primary key (scope, name, holder)
) with (fillfactor = 45);

-- The workers, for people to see: it decides nothing. A row for each process's worker, written
-- when it starts, every few seconds, and when it has ended.
create table bgjob_worker (
    -- The low bits of the tokens of its claims.
    number        bigint      generated always as identity,
    host          text        not null,
    pid           integer     not null,
    program       text        not null,
    release       text,
    version       text        not null,
    started_at    timestamptz not null default clock_timestamp(),
    -- In the same order: a queue, its slots, and how many handlers are busy.
    queues        text[]      not null,
    slots         integer[]   not null,
    running       integer[]   not null default '{}',
    types         text[]      not null,
    -- Seconds after its enqueue within which it puts back a job of another type.
    unknown_for   real,
    -- Seconds: of a lease, and between two beats.
    lease         real        not null,
    every         real        not null,
    seen_at       timestamptz not null default clock_timestamp(),
    state         text        not null default 'working',
    -- Since the start: completed, retried, rescheduled, dead, lost, timed_out, errors,
    -- cancelled.
    counts        bigint[]    not null default '{}',
    -- The jobs that have run longest, and since when.
    longest       text[]      not null default '{}',
    longest_since timestamptz[] not null default '{}',
    note          text,
    constraint bgjob_worker_pkey primary key (number)
) with (
    -- No other index, and room in the page: so each beat is a heap-only update.
    fillfactor = 25,
    -- Each beat leaves a dead row, which the next ones remove from the page. Vacuum comes for
    -- the rows of old workers.
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_scale_factor = 0
);

-- What ended in each minute, by queue and type, for people to see it: it decides nothing. Each
-- worker that counts minutes writes once a minute what it has counted since the last time.
create table bgjob_minute (
    minute       timestamptz not null,
    queue        text collate "C" not null,
    type         text collate "C" not null,
    completed    bigint  not null,
    retried      bigint  not null,
    rescheduled  bigint  not null,
    dead         bigint  not null,
    lost         bigint  not null,
    timed_out    bigint  not null,
    cancelled    bigint  not null,
    -- The handlers that ended; for how long they ran, and their jobs had been due: all together,
    -- and the longest.
    runs         bigint  not null,
    run_seconds  double precision not null,
    longest_run  double precision not null,
    wait_seconds double precision not null,
    longest_wait double precision not null,
    constraint bgjob_minute_pkey primary key (minute, queue, type)
);

-- Completed jobs of the types that are kept, for a week: a partition for each day. Old ones are
-- emptied by truncate, so there is never a dead row, and nothing to vacuum.
create table bgjob_history (
    -- Days since 1970, modulo 8.
    day      smallint    not null,
    job_id   text collate "C" not null,
    queue    text        not null,
    type     text        not null,
    attempt  integer     not null,
    -- The claim: it tells when the job started, and on which worker.
    token    bigint      not null,
    ended_at timestamptz not null default clock_timestamp()
) partition by list (day);

create table bgjob_history_0 partition of bgjob_history for values in (0);
create table bgjob_history_1 partition of bgjob_history for values in (1);
create table bgjob_history_2 partition of bgjob_history for values in (2);
create table bgjob_history_3 partition of bgjob_history for values in (3);
create table bgjob_history_4 partition of bgjob_history for values in (4);
create table bgjob_history_5 partition of bgjob_history for values in (5);
create table bgjob_history_6 partition of bgjob_history for values in (6);
create table bgjob_history_7 partition of bgjob_history for values in (7);

-- Not unique: an id may be used again.
create index bgjob_history_job_id on bgjob_history (job_id);

-- The ids that jobs with keep take, and what became of these jobs. The enqueue writes the row, in
-- the same statement as the job. What ends the job writes the rest, in that same statement.
create table bgjob_result (
    id         text collate "C" not null,
    -- When the id is free again, and the row to be deleted. Null: the job is live.
    until      timestamptz,
    -- What the handler gave, as JSON; null for nothing. Not of type json: the database may have any
    -- encoding.
    value      bytea,
    -- Why the job failed. Null: it is live, or completed.
    error      text,
    queue      text,
    type       text,
    arg        bytea,
    attempt    integer,
    -- The last claim: it tells when the attempt began, and on which worker.
    token      bigint,
    created_at timestamptz,
    ended_at   timestamptz,
    constraint bgjob_result_pkey primary key (id)
);

-- The rows to be deleted.
create index bgjob_result_until on bgjob_result (until) where until is not null;

-- A later version that only adds something, such as a nullable column, has the comment
-- 'bgjob schema 2, works with 1': code that needs version 1 starts with it as well.
comment on table bgjob_job is 'bgjob schema 1';
