"""What the command does: `python -m bgjob`, or `bgjob` if it is installed.

`commands` has one module for each, imported only when it is called, so that `bgjob stats`
does not wait for the imports of `bgjob worker`. `arguments` parses what they share,
`database` opens the connection; `table`, `progress`, `explained`, `dead_groups` and `payload`
print. `worker` is the process around a Worker: its target, its signals, its log, its health, and
several of them under one supervisor. `listener`, `health`, `probing` and `exporting` answer and
ask probes and metrics. `top` is a view of the terminal, and `page` serves the web page.
`demo` and `playground` are programs of their own: `demo_place` is their server, `demo_jobs` what
the demo does, `demo_web`, `demo_world` and `demo_shop` what its page shows.
"""
