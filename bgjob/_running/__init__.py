"""How one job is run and settled, where that is no matter of slots.

`transaction` runs a transactional handler: its own connection, the settlement of the job in
the handler's transaction, and what a lost connection leaves in doubt. It is written once, as
a generator of steps; a driver for threads and one for coroutines take them. `Client.do` and
`bgjob.testing` use it too, so that a job means the same in a worker, in the caller's thread
and in a test.

`loop` is the event loop in a thread of its own that coroutine handlers run on.
"""
