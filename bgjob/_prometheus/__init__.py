"""What is measured, and under which names? The body of bgjob.ext.prometheus.

    families  the names, labels and meanings of all metrics
    counts    what a worker counts for each queue and type, as numbers that can be added up
    metrics   the observer that counts, and the collector of a process
    database  the collector of what a database holds
    totals    the collector of several processes, for the parent of `bgjob worker --processes`

A job's numbers are one list: adding up processes is adding up lists, and a change of them is a line
of JSON. Objects of prometheus-client are made for each scrape, which is seldom.
"""
