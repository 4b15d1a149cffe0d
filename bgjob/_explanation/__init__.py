"""Why does a job not run? The rules of `client.explain()`.

    steps       which statements are asked, and in which order
    seen        their answers, as one value
    reasons     the rules, in the order of their reasons
    job         rules of a live job: its claim, its time, what it waits behind
    workers     rules of the workers that would run it
    gone        rules of an id without a live job, and of what could not be looked at
    words       times, workers, claims, arguments of commands

The rules are pure, so they can be tested without a database; the tests of `client.explain()` make
each situation in one. A new reason is a rule, in its place in the list of `reasons`; what it needs
to know is a field of `Seen`, which `steps` fills.

- All reasons that hold are given: an operator who lifts the first needs to know the next.
- Each statement is its own transaction, read-only, with limits for its time and for its waits
  (`_sql/server.bounds`). So the job may move on between two of them: what is said of it is of one
  moment, and of the others a moment later.
- The job is found first. If a later statement is refused, a reason says what was not looked at.
- The registry of workers decides nothing here either: where it may miss a worker, the reason says
  so, and does not block.
"""
