"""How a statement is sent: the library's own connections.

`connection` makes them from the user's connection string, with the settings that the library
depends on, and gives up on a silent server. `cursor` writes and reads values on any connection,
whatever the program has registered for its own SQL. `pool` keeps a client's connections, without
a thread of its own, and borrows those of a user's pool. `fork` notices a process that was forked
from the one that opened them, and must not use them. `hosts` remembers which of several servers
takes writes. `messages` sends several statements at once, and lets a thread wait for them within
libpq. `pooler` turns what a pooler does to a connection into errors with a remedy. `polling`
and `event_loop` are what differs between operating systems.

A server may vanish silently: no read fails, and no write fails for a long time. Each wait of the
library has a limit:

    connecting      10 s a host, or what the connection string says; less if the caller has
                    less time (`options`)
    an answer       the connection's `patience`, in seconds without a byte: 30 for a client and
                    a command, 10 for a worker; no limit while a handler's own SQL runs
    a connection    30 s for a client's pool to open one, or for another caller to release one
    a call of libpq 10 s in `messages`; the control thread ends it
    a lost network  TCP keepalives after 30 s, and 60 s for what was sent (`_DEFAULTS`): the only
                    limit in a handler's own SQL

A connection that is given up is closed, and the error is Silence, an OperationalError. A close
never waits. No statement is sent twice: it may have been committed, and the caller has to find
out.

All are of two classes, `Connection` and `AsyncConnection`; `pool` and _running/sessions.py have
subclasses. A control thread's `WorkerConnection` is one, too, but waits with a loop of its own:
after a millisecond it hands jobs to other slots, then it checks four times a second whether the
worker's time is over, where a wait of psycopg has one interval. And at Ctrl-C psycopg asks the
server to cancel the query, which may take 10 s. A client needs that, because its query would
keep rows locked; a worker that starts over a dead network should end immediately.
"""
