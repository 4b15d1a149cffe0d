"""What a handler's return value means.

    policy       a job type's options, checked: attempts, backoff, timeout, priorities, key
    call         a function, inspected: which of job, payload, connection, state and checkpoint
                 it takes
    checkpoints  what a parameter `checkpoint` is given
    route        both, and the callable that a slot calls with a job
    batch        the route of a handler of several jobs, and what its answer means for each
    expiry       a job that may have expired: dead-letter it, or route it
    unknown      a type without a route: put its jobs back, or dead-letter them

`Mux.register` makes all three. It is the only place that looks up an option: among its
arguments, then on the registered class, then among the defaults. The policy checks itself
(`policy`). The function is inspected once (`call`), and the callable is composed from the inside
out: the function, its state, its checkpoint, the decoding of its payload, the middleware of its
type, the middleware of the Mux. A function that takes only a job, without middleware, is called
directly.
`Mux.bound` composes again, with a state.

Policies and routes do not change. A worker that limits a run, and a test that records one, make
a copy of the route with another handler.

`route` runs the handler, and turns what it returned or raised into the Result to store. This
is a hot path: a completed job costs the calls of `Mux.route`, `Route.run` and the handler.
"""
