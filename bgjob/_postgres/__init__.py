"""How a statement is sent: the library's own connections.

`connection` makes them from what the user gave, with the settings that the library depends
on, and with a way to give up on a server that falls silent. `pool` keeps those of a client,
without a thread of its own. `fork` notices a process that was forked from the one that
opened them, and must not use them.
"""
