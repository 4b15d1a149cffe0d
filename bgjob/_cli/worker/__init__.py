"""How the command runs workers: one process, or several under a supervisor.

`target` finds what the command line names, `serve` runs its workers, `served`, until they end,
`signals` turns SIGTERM and SIGINT into a shutdown, `processes` supervises several, `reload` starts
one again when its files change, both on `child`, `log` writes for people or for machines.
"""
