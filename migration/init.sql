-- bgjob, schema version 1. Apply it with your own migration tool, in any
-- schema: bgjob finds its tables through search_path.

create table bgjob_job (
    -- A length, not a check of it: that would be made again at each claim (a tenth of what
    -- a claim costs the server). In the order of bytes ids are found in less time than by
    -- the rules of a language (a tenth of what it costs to delete a job).
    id          varchar(255) collate "C" not null,
    queue       varchar(255) collate "C" not null,
    type        varchar(255) not null,
    arg         bytea,
    attempt     integer     not null default 0,
    last_error  text,
    priority    smallint    not null default 0,
    -- How many workers in a row have died, or lost the lease, with the job in
    -- flight. From two on it is a suspect: claimed in groups, until it is alone.
    deaths      smallint    not null default 0,
    -- No two jobs with one key run at once. Those that were claimed while it was
    -- held wait aside, in no claim's way, until it is free.
    exclusive   varchar(255) collate "C",
    waits       boolean     not null default false,
    next_run_at timestamptz not null default clock_timestamp(),
    -- A claim: who holds the job, and until when. No index may cover these
    -- two or attempt: claims and extensions then stay heap-only updates,
    -- for which the fillfactor leaves room in the page. Measured against a
    -- lease kept in next_run_at: 445 bytes of WAL a job instead of 698.
    token       bigint,
    lease_until timestamptz,
    created_at  timestamptz not null default clock_timestamp(),
    updated_at  timestamptz not null default clock_timestamp(),
    constraint bgjob_job_pkey primary key (id),
    constraint bgjob_job_id_check check (id <> ''),
    constraint bgjob_job_queue_check check (queue <> ''),
    constraint bgjob_job_type_check check (type <> ''),
    constraint bgjob_job_exclusive_check check (exclusive <> '')
) with (
    -- A claim makes a row 16 bytes longer, so that pages filled to a half have no room for
    -- the last few. To claim and delete a job wrote 357 bytes of WAL at 45, with every claim
    -- heap-only; 450 at 50 (94 %), 658 at 70 (40 %), 776 at 100 (3 %). To enqueue it wrote
    -- 381 at each.
    fillfactor = 45,
    -- To give back the pages of a drained queue, vacuum locks out every claim: the longest
    -- one beside it took 27 to 38 ms, and 5 to 10 ms without. The next burst uses the pages.
    vacuum_truncate = off
    -- Other thresholds and no cost delay for autovacuum made no difference that could be
    -- told from noise.
);

-- The only way in which a claim finds its rows, in the order it takes them.
create index bgjob_job_due on bgjob_job (queue, priority, next_run_at) where not waits;

-- The suspects, those with the most deaths first; hardly ever more than a few. The
-- order keeps the planner from the index above, which does not have it. With statistics
-- of a smaller table a look for the first suspect among 250,000 due jobs, of which none
-- was one, took 100 ms there.
create index bgjob_job_suspect on bgjob_job (queue, deaths desc, priority, next_run_at)
    where deaths > 1 and not waits;

-- The jobs of a key, and those of them that wait, in the order they run.
create index bgjob_job_exclusive on bgjob_job (exclusive, waits, queue, next_run_at, id)
    where exclusive is not null;

-- The keys that are held or waited for. Whoever changes anything about a key locks its
-- row first, and looks at the jobs after that. A key is held while its job has the token.
create table bgjob_exclusive (
    key    text   not null,
    job_id text,
    token  bigint,
    -- Nothing of this queue waits for the key that was due before this time, or then and has
    -- a lower id: where to look from, so that it is not over all that an old snapshot keeps.
    -- No time says nothing.
    queue    text,
    since    timestamptz,
    since_id text,
    constraint bgjob_exclusive_pkey primary key (key)
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
    constraint bgjob_dead_job_pkey primary key (id)
);

-- One job id may die more than once: requeued, or enqueued again.
create index bgjob_dead_job_job_id on bgjob_dead_job (job_id);

-- One row a schedule. Whoever moves its tick forward enqueues the jobs.
create table bgjob_schedule (
    name        text        not null,
    spec        text        not null,
    queue       text        not null,
    type        text        not null,
    arg         bytea,
    priority    smallint    not null,
    exclusive   text,
    -- All ticks up to this one are dealt with.
    tick        timestamptz not null default clock_timestamp(),
    -- The last tick for which a job was enqueued, and that job.
    last_run_at timestamptz,
    last_job_id text,
    next_run_at timestamptz,
    paused      boolean     not null default false,
    constraint bgjob_schedule_pkey primary key (name)
);

-- The queues from which nothing is claimed, and until when.
create table bgjob_pause (
    queue text        not null,
    until timestamptz not null default 'infinity',
    constraint bgjob_pause_pkey primary key (queue)
);

-- A later version to which only something was added, such as a column that may be null, says
-- 'bgjob schema 2, works with 1': then what needs version 1 starts with it as well.
comment on table bgjob_job is 'bgjob schema 1';
