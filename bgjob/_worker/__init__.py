"""Which threads do it: the way of a job from its claim to its settlement.

A worker has these threads. `group` starts them and ends them together.

    control thread, one a queue                    the server
    +------------------------------------+
    | collect outcomes, wake the engine  |
    | engine.step()                      |         one connection a queue,
    | Exchange -> session.exchange()  ---+---->    owned by `session`
    |             acknowledge()       <--+----
    | Effects  -> executor.submit()      |
    |             events.tell()          |
    | Sleep    -> session.wait(): for a  |
    |             notification, or for   |
    |             the waker              |
    +-----+------------------------^-----+
          | jobs, by one deque     | outcomes, by another, and the waker
          v                        |
    +-----+------------------------+-----+         a connection a slot, for
    | slots: the right to run a handler, |---->    transactional handlers and
    | `concurrency` of them              |         for saves of checkpoints
    |   threads   run plain handlers     |
    |   tasks     run coroutines, all on |
    |             one event loop         |
    +------------------------------------+

    +------------------------------------+
    | event thread, one a worker: tells  |
    | the observer what the control      |
    | threads have put into its queue    |
    +------------------------------------+

- The control thread (`control`) alone touches the engine and the connection. No handler runs
  on it, so that leases are extended whatever handlers do.
- A slot is the right to run a handler. A thread (`threads`) or a task of the loop (`tasks`) has
  it, takes job after job from the deque, and passes it to the other side with a job of the
  other kind, plain or coroutine. `executor` starts threads and tasks. Every second, and
  immediately after a death that Python reports, it checks that each is alive, and settles or
  releases the job of a dead one.
- Of the jobs with the same exclusive key one has a slot, or waits for one (`lines`). The next one
  takes its place when it ends, without the control thread.
- A slot that commits a transactional job may have the next one reserved (`reservations`): its
  transaction begins in the same message. A thread waits for the answer within libpq, and the
  control thread ends a wait of 10 s (_postgres/messages).
- The event loop (`_running/loop`) is one for all queues of a worker; an AsyncWorker uses its
  caller's. The observer is told of a loop that is blocked for a third of the lease.
- The event thread (`events`) calls the observer, so that a slow one delays no job. Only
  job_started is called on the handler's own thread, before the handler.

The other files: `group` starts the control threads of all queues and ends them, with the checked
`options` of the worker. `session` opens the connection (_postgres/connection) and reads what
comes back (`answer`); `clock` notices that the server's clock was set, and `repairs`
corrects that, and dead-letters jobs that cannot be claimed or read. `batches` gathers the jobs of
batch handlers, and runs a `batch` of them in a slot. `timeouts` gives up handlers
that take too long, or whose jobs are cancelled. `observers` makes one observer of many. `state`
is the object that handlers share, opened before the first job and closed after the last.
`registry` writes the worker's row in bgjob_worker, with what `tally` has counted; `minutes` writes
what it has counted by queue and type. `history` empties old days of completed jobs that are kept.

The way of a plain job from claim to settlement is these twelve files, in order:

    control      the turn: step, exchange, acknowledge
    engine       which kinds of work are next (_engine/engine): a claim
    protocol     the exchange, as statements in their order (_engine/protocol)
    claims       the statement that claims (_sql/claims)
    session      sends the exchange, and reads what comes back
    executor     free slots get a thread
    threads      a thread takes the job and runs it
    route        whose handler it is, and what attempts it has (_handlers/route)
    slots        the outcome goes back; the waker wakes the control thread
    settling     the outcome waits for the next exchange (_engine/settling)
    settlements  the statement that stores it (_sql/settlements)
    events       the observer's events, once that is committed

A coroutine handler is run by `tasks` instead of `threads`. A transactional one has settled its
job itself when the outcome comes back (_running/transaction).
"""
