"""How the command runs a worker: one process, or several under a supervisor.

`target` finds the Mux that the command line names, `serve` runs the worker until it ends,
`signals` turns SIGTERM and SIGINT into a shutdown, `processes` supervises several, `reload` starts
one again when its files change, both on `child`, `log` writes for people or for machines.
"""
