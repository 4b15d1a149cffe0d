"""What a handler's return value means.

`call` inspects a function once, when it is registered: whether it is a coroutine function,
which of job, payload and state it takes, and whether it accepts them. `route` is a handler
with its policy (attempts, backoff, timeout, transaction, key): it runs the handler, and
turns what it returned or raised into a Result.
"""
