"""Would this release handle the jobs that are there? The rules of `bgjob.preflight`.

    steps     what is read, in which order; each step is one short statement
    sample    which jobs of a type are read, if not all
    judge     jobs -> tallies: what a worker with this Mux would do with each
    findings  tallies -> findings: the sentences, and what to do
    releases  the same of live workers with types that this release lacks
    report    the values that the caller gets

`judge` and `findings` are pure: their tests need no database. `steps` is a generator of
statements, so a test can answer them; `bgjob.preflight` sends them.

- A payload is decoded by the codec of its type, exactly as in front of the handler. The codec and
  a callable `exclusive=` are the only code of the program that runs. Middleware does not: where it
  changes payloads, the caller leaves the type out.
- Whatever that code raises, even SystemExit, is a finding about a job and ends nothing.
- Memory depends on the number of queues, types and problems, and not on the number of jobs: a page
  holds at most 5,000 jobs with payloads of up to 4 kB; larger ones are read by 8 MB.
- Jobs come and go meanwhile. What is reported was true of each job when its page was read.
"""
