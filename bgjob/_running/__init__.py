"""How one job is run and settled, apart from slots.

    one_job            claims a job, gets its key, runs it and settles it: the steps that
                       `Client.do`, `AsyncClient.do`, `testing.drain` and `testing.adrain` share
    do                 `Client.do` and `AsyncClient.do`: the caller may be interrupted or cancelled
    transaction_steps  a transactional job: run the handler, settle the job, commit
    transaction        takes these steps, on a session of the worker's
    batch              what became of the jobs of one call of a batch handler
    checkpoints        keeps what a handler saves, on a session for each save
    sessions           the connections of transactional handlers, and of checkpoints
    payloads           fetches a large payload, which the claim did not return
    ending             how a job ended
    loop               the event loop, on a thread of its own, that runs coroutine handlers
    joining            how a job is written into a group
    drive              takes the steps of a generator, on a thread or in a task

A worker claims and settles by its engine, many jobs in one exchange. It shares `transaction`,
`sessions` and `loop` with `do` and `drain`, and what they send: `one_job` makes the same
exchanges for a single job. So a job behaves the same in a worker, in its caller's thread and
in a test. What a result does to the row is in `_sql/settlements`, for all of them.

    ending       how a job ended: a result that is yet to be stored, or what became of its own
                 transaction (committed, fenced, not begun, commit unknown)
    settle       store the ending; the claim's token fences it
    release      store that the job did not start: its attempt is given back
"""
