from bgjob import Backoff, Mux

exponential = Backoff(base=1, factor=4, maximum=60, jitter=0)
linear = Backoff.linear(10, jitter=0)
constant = Backoff.constant(5, jitter=0)
for backoff in (exponential, linear, constant):
    print([backoff(attempt) for attempt in (1, 2, 3, 4)])

mux = Mux()
mux.register("fetch", print, backoff=linear)
mux.register("poll", print, backoff=lambda attempt: 1.0 if attempt < 10 else 60.0)
