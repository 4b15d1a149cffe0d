"""What the command does: `python -m bgjob`, or `bgjob` where it is installed.

`commands` has one module for each; it is imported when it is called for, so that
`bgjob stats` does not wait for what `bgjob worker` needs. `arguments` reads what they share,
`database` opens the connection, `table` and `progress` print. `worker` is the process around
a Worker: its target, its signals, its log, and several of them under one supervisor.
`demo` and `playground` are programs of their own.
"""
