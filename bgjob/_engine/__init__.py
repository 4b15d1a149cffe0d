"""What a worker decides: which jobs it claims, extends, settles and releases, and when.

Nothing here reads a clock, opens a socket or starts a thread. The control thread of
`_worker` reports events with their time, and executes the answers. So a
simulation can run a worker through thousands of histories against a table in memory, with a
fault at any point, and check each promise after each turn (`tests/test_simulation.py`).

One turn:

    control thread                      engine
    --------------                      ------
    finish(outcomes), wake(notice)  ->  records them
    step(now)                       ->  Exchange: what to send, as one transaction
                                        Withdraw: take back jobs that wait for a slot
                                        Sleep(until): nothing to do before that time
                                        Stop: it has ended
    sends the exchange to the server
    acknowledge(reply), or          ->  Effects: jobs to run, events to tell
    reject() or disconnect()        ->  the same work comes again, in smaller parts

An exchange carries all work of that time: outcomes to store, jobs to release, leases to
extend, keys to acquire and to release, a claim or a sweep, the notify lock. `protocol` defines
the statements and their order.

The life of a held job
======================

A worker holds a job from the answer that brings it until the answer that settles or releases
it. In between it is in one of these states:

    state     stored in                   what moves it on
    -------   -------------------------   -------------------------------------------------
    claimed   `_batches[token]`, in all   settled or released: gone
              states below but the last   the lease was lost to another worker: lost
    wanting   `_wanting`                  its exclusive key is granted: running
                                          another job has the key: it waits in the table,
                                          and the worker does not hold it any more
                                          the key's row is locked: wanting; or locked
    running   `_batches` only: it waits   finish(): pending; or gone, where the handler's
              for a slot, or is in one    own transaction has settled it
                                          withdrawn(): pending, to be released
                                          abandon(): leaving
    pending   `_pending`                  step() puts it into an exchange: sent
    sent      `_sent`                     acknowledge(): gone
                                          reject(): pending, in halves; alone: refused
                                          reject() for a lock: locked
                                          disconnect(): pending, and unsure
    refused   `_refused`                  its pause is over: sent, alone
                                          too many are refused for their data: the oldest
                                          are left to their leases: lost
    locked    `_apart`, `_apart_wanting`  a probe finds its row or its key free: pending,
                                          or wanting
    unsure    `_unsure`, and `_pending`   sent again. Its row is found: gone. It is not,
              or `_sent`                  within the lease: it was settled the first time
    leaving   `_leaving`                  the server was told, once or twice: gone
    lost      `_lost`                     its handler ends: the outcome is dropped

Running and wanting jobs take up slots. The worker extends the leases of all but the last two.

The vocabulary
==============

    batch       the jobs of one claim: they share a token and a lease
    token       the number of a claim. What ends or extends a claim names it, so that a
                worker whose lease has ended changes nothing: a fence
    mark        the due time up to which a priority has been looked through
    look        a claim, from the marks on; a sweep looks behind them as well, frees what
                dead workers held, and says when the next job is due
    flow        jobs go through so fast that the next exchange is planned (`ahead`) while
                one is in progress
    notify lock while an idle worker holds it, enqueues to the queue notify
    suspect     a job that two workers died with

The parts: `protocol` has what is exchanged with the control thread, and `outcome` how a job
ended. `engine` decides, and asks `pace` how many jobs may be in flight, `watermarks`
where to look, `notify_lock` whether to take or release the lock, and `isolation` whether
suspects or other jobs are next.
"""
