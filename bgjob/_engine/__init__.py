"""What a worker decides: which jobs it claims, extends, settles and releases, and when.

Nothing here reads a clock, opens a socket or starts a thread. The control thread of
`_worker` reports events with their time, and executes the answers. So a
simulation can run a worker through thousands of histories against a table in memory, with a
fault at any point, and check each promise after each turn (`tests/test_simulation.py`).

One turn:

    control thread                      engine
    --------------                      ------
    finish(outcomes), wake(notice)  ->  records them
    shutdown(), abandon()
    step(now)                       ->  Exchange: what to send, as one transaction
                                        Withdraw: take back jobs that wait for a slot
                                        Sleep(until): nothing to do before that time
                                        Stop: it has ended
    at_once(notice)                 ->  Exchange, or None: the claim of an idle worker that was
                                        notified in its sleep, without another turn
    sends the exchange to the server
    acknowledge(reply), or          ->  Effects: jobs to run, events to tell
    reject() or disconnect()        ->  the same work comes again, in smaller parts

An exchange carries all work of that time: outcomes to store, jobs to release, leases to
extend, keys to acquire and to release, a claim or a sweep, the notify lock, a ration. `protocol`
has the exchange and the order of its statements, `reply` the answer.

The life of a held job
======================

A worker holds a job from the answer that brings it until the answer that settles or releases
it. In between it is in one of these states:

    state     stored in                   what moves it on
    -------   -------------------------   -------------------------------------------------
    claimed   `leases`: the batch of      settled or released: gone
              its claim, in all states    the lease was lost to another worker: lost
              below but the last
    wanting   `keys.wanting`, or the      its exclusive key is granted: running
              `acquire` of a sent         another worker has the key, or this one has
              exchange                    enough of its jobs: it waits in the table,
                                          and the worker does not hold it any more
                                          the key's row is locked: wanting; or locked
    running   `leases` only: it waits     finish(): pending; or gone, where the handler's
              for a slot, or for one      own transaction has settled it; or wanting, if
              before it of its key, or    its handler names a key
              is in a slot
                                          withdrawn(): pending, to be released
                                          abandon(): leaving
    pending   `settling.pending`          step() puts it into an exchange: sent
    sent      `outcomes` of a sent        acknowledge(): gone; missed, if no row was found
              exchange                    reject(): pending, in halves; alone: refused
                                          reject() for a lock: locked
                                          disconnect(): pending, and unsure
    missed    `settling.missed`           sent once more: it was replaced while it ran, and its
                                          successor is written; or its row is not found:
                                          doubtful
    refused   `settling.refused`          its pause is over: sent, alone
                                          too many are refused for their data: the oldest
                                          are left to their leases: lost
    locked    `locked.outcomes`,          a probe finds its row or its key free: pending,
              `locked.wanting`            or wanting
    unsure    `leases.unsure`, and        sent again. Its row is found: gone. It is not,
              pending or sent             within the lease: it was settled the first time,
                                          unless it was cancelled: doubtful
    leaving   `_leaving` of the engine    the server was told, once or twice: gone
    lost      `leases.lost`               its handler ends: the outcome is dropped
                                          it was cancelled: cancelled
    doubtful  `cancels`, and lost or      the server says whether a cancel has ended its claim,
              gone                        and the observer is told
    cancelled `cancels.running`, and      its handler ends, or is given up: gone
              lost

Running and wanting jobs take up slots, but for those that wait for one before them of the same
key (`pace.behind`). The worker extends the leases of all but lost jobs.

The jobs of a key
=================

A key is held by claims, of one worker, until the last of their jobs that were granted it is
settled, given back or lost. What follows from that:

- The jobs of a key that one claim brings are asked for together, and so are those of the next
  claims, which join the chain. `_worker/lines` runs them one after the other.
- They run in the order in which they are due, whatever their priorities. A job that is retried
  or rescheduled is due later, and the rest of the chain goes on. What comes after a job that is
  given back unstarted is given back too, so that each keeps its place.
- When one is lost or cancelled, those that have not started are given back: the lease of the
  rest may be over as well. A cancelled job's handler is interrupted or given up; then the next
  one may start. So it is after a timeout.
- While a process is frozen its leases may end, and another worker has the key. So the next job of
  a chain starts only before the end of the first lease (`held_until`), and else is given back.
- A worker has as many jobs of a key as one slot runs in a fiftieth of a second, or two round
  trips; at first, as many as it has slots. The others wait aside in the table, so that claims meet
  other jobs, and as many are woken when the key is free. Jobs that turn out to be slow give the
  chain behind them back (`pace.stale_at`).
- A shutdown gives back all but what has started.
- A job that was replaced while it ran has its key until its successor is written. Its first
  settlement passes over it, and the release that is sent with that finds the key held; the second
  settlement releases it again.
- Keys are locked in their order, in one statement of a transaction, before any row of theirs.

The parts
=========

Each decides one kind of work, and its docstring says what always holds for it. The engine asks
them in turn what goes into the next exchange, and reports what became of it to all:

    Engine        which kinds of work are next; the end of the worker
      pace        how many jobs may be in flight, and how many are
        batch_pace  the same where handlers take several at once
      leases      which jobs are held, until when, and which are lost or in doubt
      settling    which outcomes go into the next exchange, and what a refusal does to them
      keys        which keys to ask for, and to release
      throttle    the limits of the queue and of types: what may be claimed, and from where
        type_limit  one of a type: its jobs that have places, or wait for one
        limits      the ration of one: places for handlers, tokens for claims
      cancels     which jobs a cancel has ended, and whose handlers to interrupt
      over        which groups may be over, so that the jobs that wait for them may be due
      locked      which rows other sessions have locked
      claims      which claim, sweep or group is next: there is room, nothing is held up
        isolation   whether suspects or other jobs are next
      lookout     when to look for jobs: after a notification, a poll, a due time
        watermarks  where claims start, and when to look behind that
        notify_lock whether enqueues have to notify this worker

`settling`, `keys` and `claims` ask `leases`; `settling` reports to `cancels`; `claims` asks
`lookout` and `pace`. No other part knows of another: what moves a job from one to the next is in
`engine`. `outcome` has the ways in which a job ends, and `pause` the time for which refused work
waits.

What always holds
=================

- Each claimed job is settled or released once. An outcome is kept until its
  settlement is acknowledged, and sent again as often as needed.
- No more jobs are claimed than free slots and the jobs' duration justify.
- A row that another session has locked delays its own settlement only. When an exchange
  was refused for a lock, the engine asks which of its rows are locked. Those are set apart.
- The session of a transaction whose connection was lost is ended once its job is settled, and
  never while it may still commit.
- A lease is extended when a third of it has passed, whether its job runs,
  waits for a slot, or waits for its settlement to be accepted.
- After an outage that was longer than the lease the worker settles and extends
  before it claims. Its sweeps never free a job that it holds itself.
- An attempt begins with its handler: jobs that were claimed by an exchange whose
  answer was lost are freed by the worker's own sweeps, and are charged nothing.
- With a limit of the queue, no more handlers run than the worker has places, and each job that it
  claims has a token. Rations are taken after the claim of an exchange, for the next ones.
- With a limit of a type, no more of its jobs are claimed than the worker has places, and each has a
  token. Claims put the others aside, so that they hold up no other type.
- Jobs that two workers died with are claimed in groups, until the killer is alone.
- A job with an exclusive key is handed out once the server has granted the key, in the order in
  which the jobs of the key are due.
- Of a job that is not held any more the observer is told once: that it was cancelled, or that
  its lease was lost. Nothing is asked for that while all jobs are held.

The vocabulary
==============

    batch       the jobs of one claim: they share a token and a lease
    token       the number of a claim. What ends or extends a claim names it, so that a
                worker whose lease has ended changes nothing: a fence
    in flight   claimed, and no outcome yet
    mark        the due time up to which a priority has been looked through
    look        a claim, from the marks on; a sweep looks behind them as well, frees what
                dead workers held, and says when the next job is due
    flow        jobs go through so fast that the next exchange is planned (`ahead`) while
                one is in progress
    careful     after a refusal: the next exchanges carry one kind of work each, so that the
                kind that is refused does not stop the others
    notify lock while an idle worker holds it, enqueues to the queue notify
    post        an idle worker with one polls at the poll interval, and is notified of enqueues
    spare       an idle worker that found all posts taken: it polls rarely; others call it
    seat        a spare with one can be called
    suspect     a job that two workers died with
    ration      what the worker has taken of a limit: places and tokens
    aside       in the table, where no usual claim meets it: a job that waits for its key, or for
                the limit of its type
    chain       the jobs of one key that this worker has; one at a time is in a handler
"""
