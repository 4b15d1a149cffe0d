"""What is wrong with a database that bgjob uses? The rules of `client.doctor()`.

A check asks one or two statements, and makes findings of their rows:

    checks      the checks in their order; which statements each of them asks
    server      rows -> findings: the server, clocks, poolers, connections, notifications
    sessions    rows -> findings: who holds the vacuum horizon, who waits for whose lock
    tables      rows -> findings: schema, dead rows, indexes
    queues      rows -> findings: leases, due jobs, pauses, schedules, dead jobs
    measuring   statements -> measurements, for an exporter of metrics
    blueprint   the tables and indexes that migration/init.sql defines

The functions from rows to findings are pure, so each rule is tested without a database; the tests
of `client.doctor()` make each fault in one.

- Each statement is its own transaction, read-only, with limits for its time and for its waits
  (`_sql/server.bounds`). So the doctor holds no horizon back itself, and no queue up.
- A check whose statement the server refuses becomes a finding that says so; the others go on.
- Nothing is repaired. A remedy is a line for a person to read and run.
- A role without pg_read_all_stats does not see what other roles run, and since when. It still
  sees who holds what.
"""
