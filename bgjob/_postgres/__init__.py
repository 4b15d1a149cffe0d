"""How a statement is sent: the library's own connections.

`connection` makes them from the user's connection string or pool, with the settings that the
library depends on, and gives up on a silent server. `pool` keeps a client's connections,
without a thread of its own. `fork` notices a process that was forked from the one that
opened them, and must not use them.
"""
