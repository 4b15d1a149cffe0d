"""Every SQL statement that bgjob runs, each a value with its parameters and its row reader.

Their rules:

- Only the database's clock decides. The due predicate compares with now(),
  which is stable and bounds the index scan; clock_timestamp() does not, and
  halves the rate over a large backlog. Due times and lease ends are written
  from clock_timestamp(), so that the rows of one call stay in order and a
  watermark can pass between them.
- A claim finds rows by position: `ctid = any (array(...))`. With statistics
  taken while the table was empty and 70,000 dead rows under an old snapshot, a
  claim of 500 took 8 to 10 ms this way, 1.4 s as `id = any (array(...))`, and 68 s as
  `id in (select ...)`.
- Every write that ends or extends a claim carries the claim's token.
- Arrays instead of loops, and always `id = any (...)` on bgjob_job in addition to
  a join with an unnested array: the plan is then an index scan, whatever the
  planner assumes about the array.

A job's row, in the order of its life:

    enqueues      write it; `prepared` is how plain jobs are usually written
    claims        take due jobs; free those of dead workers
    survey        what is there for the next claims, and what is not committed yet
    leases        extend, look which rows are locked, abandon
    keys          its exclusive key: who has it, who waits for it
    undisputed    the usual case: keys that no other job is to get first
    key_rows      the locks of keys, and what statements about keys share
    groups        its group, and the job that waits for that
    transactions  its handler's own transaction
    limits        the limit of its queue, and what workers have taken of it
    settlements   what its result does to it: the only place that says so
    jobs          look at it, alone; `job_pages` in lists
    steering      cancel it, abandon it, make it due, change its priority
    dead          its row in the dead-letter table
    triage        that row tried again: a canary, then the rest
    repairs       rows that cannot be claimed or read
    history       what is left of it if jobs of its type are kept
    workers       the row of a worker, for people to see it
    minutes       what ended in each minute, likewise

What the doctor asks: `server` (who holds what up), `storage` (tables and indexes) and `backlog`
(what waits for too long).

`tokens` makes the numbers of claims, and reads them. `execute` sends statements, and nothing
else does.
"""
