"""What the command does: `python -m bgjob`, or `bgjob` if it is installed.

`commands` has one module for each, imported only when it is called, so that `bgjob stats`
does not wait for the imports of `bgjob worker`. `arguments` parses what they share,
`database` opens the connection, `table` and `progress` print. `worker` is the process around
a Worker: its target, its signals, its log, and several of them under one supervisor.
`demo`, with `demo_jobs`, and `playground` are programs of their own.
"""
