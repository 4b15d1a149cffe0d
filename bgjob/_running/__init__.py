"""How one job is run and settled, apart from slots.

`transaction` runs a transactional handler: its own connection, the settlement of the job in
the handler's transaction, and what a lost connection leaves in doubt. It is written once, as
a generator of steps; a driver for threads and one for coroutines take them. `Client.do` and
`bgjob.testing` use it too, so that a job behaves the same in a worker, in the caller's thread
and in a test.

`loop` is the event loop, on a thread of its own, that runs coroutine handlers.
"""
