"""The machinery of the long run: producers, workers and faults."""

import contextlib
import heapq
import itertools
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, LiteralString

import psycopg
from psycopg.conninfo import make_conninfo

from bgjob import AsyncClient, Client, EnqueueRequest
from bgjob.ext.embedded import EmbeddedServer
from faults.app import Colour
from faults.proxy import Proxy
from faults.world import Acknowledged, Process, World

LEASE = 2.0
POLL_INTERVAL = 0.2
GRACE = 2.0

MAX_ATTEMPTS = 25
"""Few enough that a killer is dead soon, and more than other jobs use by bad luck."""

BACKLOG = 200
"""Live jobs, not counting suspects, at which the producers wait."""

SLOTS = {"thread": 8, "async": 1000}
"""Concurrency by colour: the coroutine workers always have a slot free, beside the backlog, a
crowd and the suspects."""

CROWD = 320
"""Jobs that are enqueued together before two workers are killed."""

IN_FLIGHT = 200
"""Jobs in flight in both at which they are killed, or after 10 s."""

CROWD_EVERY = 60.0
"""Seconds from one crowd to the next."""

DEFAULTS = "alter database {} set default_transaction_isolation = 'repeatable read'"
"""Settings that the administrator of this database made."""

GAP = 1.5
"""Seconds from one fault to the next, on average."""

KILLER_EVERY = 90.0
"""Seconds from one job that kills its workers to the next."""

PEACE = 300.0
"""Seconds for the queue to become empty when all faults are over."""

NETWORK_LIMIT = 15.0
"""Seconds after the network's return in which a worker is to work again."""

RECOVERY = "from a lease's end until its job was claimed again, while a worker had slots free"
LOCKED = "until it was freed or claimed again, where a session that was left behind had locked it"
SUSPECT = "until it was claimed again, of jobs with two deaths or more, which wait for their group"
DELAY = "from due to its first claim while a worker had slots free"

INDEXES = """
    create index on ledger (job_id);
    create index on ledger (pid, at);
    create index on ledger (at)
"""

_ANYWHERE = """
    select exists (select from ledger where job_id = any(%s))
        or exists (select from bgjob_dead_job where job_id = any(%s))
"""


# -- producers ---------------------------------------------------------------------------


class Producer:
    """Enqueues jobs in one way, and acknowledges the written ones to the world.

    Args:
        name: the ids begin with it.
        enqueue: writes jobs, all or none.
        may_go_on: whether there is room for more.
        repeated: called after the commit of jobs that were enqueued again, with its connection.
        anywhere: the query that tells whether any of these ids has ended.

    """

    def __init__(
        self,
        name: str,
        world: World,
        dice: random.Random,
        enqueue: Callable[[list[EnqueueRequest]], object],
        may_go_on: Callable[[], bool],
        repeated: Callable[[psycopg.Connection[Any]], object] = lambda _: None,
        anywhere: LiteralString = _ANYWHERE,
    ) -> None:
        self._repeated = repeated
        self._anywhere = anywhere
        self.counts: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._name = name
        self._world = world
        self._dice = dice
        self._enqueue = enqueue
        self._may_go_on = may_go_on
        self._numbers = itertools.count()
        self._end = threading.Event()
        self._direct = Client(world.dsn)
        self._thread = threading.Thread(target=self._run, name=f"producer-{name}")

    def start(self) -> None:
        """Start to produce."""
        self._thread.start()

    def end(self) -> None:
        """Begin to end: enqueue nothing more."""
        self._end.set()

    @property
    def is_alive(self) -> bool:
        """Whether it is running."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait until the enqueue under way has returned."""
        self.end()
        if self._thread.ident is not None:
            self._thread.join()
        self._direct.close()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                if self._may_go_on():
                    self._produce()
                else:
                    self._end.wait(0.05)
        except BaseException as error:
            self.failure = error

    def _produce(self) -> None:
        dice = self._dice
        kind = dice.choice(["plain", "transactional"])
        arg, delay = self._work()
        count = dice.randint(20, 60) if dice.random() < 0.02 else 1
        self.counts["bulk"] += count if count > 1 else 0
        self.counts["delayed"] += count if delay else 0
        self.produce(kind, arg, count=count, delay=delay)

    def _work(self) -> tuple[dict[str, Any], float]:
        """The action of a job, and the delay before it."""
        dice = self._dice
        arg: dict[str, Any] = {}
        delay = 0.0
        match dice.choices(
            ["quick", "short", "slow", "long", "block", "again", "reschedule", "parent", "dlq"],
            [50, 20, 1, 0.5, 0.3, 12, 6, 6, 1],
        ):
            case ["short"]:
                arg = {dice.choice(["sleep", "linger"]): dice.uniform(0, 0.3)}
            case ["slow"]:
                arg = {dice.choice(["sleep", "linger"]): dice.uniform(0.5, 3) * LEASE}
            case ["long"]:
                arg = {dice.choice(["sleep", "linger"]): GRACE + dice.uniform(1, 6)}
            case ["block"]:
                arg = {"block": dice.uniform(0.2, 1.5) * LEASE}
            case ["again"]:
                arg = {"then": dice.choice(["retry", "raise"]), "until": dice.randint(2, 3)}
            case ["reschedule"]:
                arg = {"then": "reschedule", "times": dice.randint(1, 2)}
            case ["parent"]:
                arg = {"children": dice.randint(1, 3)}
            case ["dlq"]:
                arg = {"then": "dlq"}
        if dice.random() < 0.1:
            delay = dice.uniform(0, 4)
        return arg, delay

    def produce(
        self, kind: str, arg: dict[str, Any], *, count: int = 1, delay: float = 0.0
    ) -> None:
        """Enqueue jobs, again and again until it is known that they are there."""
        requests = [
            EnqueueRequest("q", kind, arg or None, id=f"{self._name}{next(self._numbers)}", delay=d)
            for d in itertools.repeat(delay, count)
        ]
        try:
            self._enqueue(requests)
        except psycopg.Error:
            self.counts["enqueues without an answer"] += 1
            self._repeat(requests)
        self._world.acknowledge(*(request.id for request in requests), type=kind, **arg)

    def _repeat(self, requests: list[EnqueueRequest]) -> None:
        """Enqueue jobs again, with the same ids, that may or may not have been written.

        A job that was written may be done already, and its id free again. So this looks, in the
        transaction that writes: what was done before the id could be taken, it sees.
        """
        ids = [request.id for request in requests]
        while True:
            # What the server is still at when the connection is lost, it ends within this.
            time.sleep(1)
            try:
                with psycopg.connect(self._world.dsn, connect_timeout=10) as conn:
                    conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
                    written = self._direct.bulk_enqueue(requests, on_conflict="skip", conn=conn)
                    [[done]] = conn.execute(self._anywhere, [ids, ids]).fetchall()
                    if None in written or done:
                        self.counts["and yet written"] += 1
                        conn.rollback()
                    conn.commit()
                    self._repeated(conn)
            except psycopg.Error:
                self.counts["enqueues without an answer"] += 1
            else:
                return


# -- the watch -----------------------------------------------------------------------------


class Monitor:
    """Samples the queue ten times a second, and measures recoveries.

    Attributes:
        backlog: live jobs, not counting suspects: producers do not wait for those.
        working_since: since when there is a worker whom no fault keeps from working; None where
            there is none. For others to set, as the next.
        server_since: since when the server is there.
        longest_claim: seconds at most from a lease's end until its job was freed.
        longest_locked: the same, and until it was claimed again, where a session that was left
            behind has locked the row.
        longest_wait: and until it was claimed again, while there was a worker with slots free,
            for jobs that kill no worker, have one death at most, and were not locked.
        longest_suspect: the same, for those with more.
        ready_since: since when there is a worker that has slots free and that no fault keeps
            from claiming; None where there is none. For others to set.
        longest_delay: seconds at most for which a due job that no worker had claimed before
            waited for its first claim, while there was such a worker.
        delayed: which job that was, and when.

    """

    def __init__(self, world: World) -> None:
        self.backlog = 0
        self.working_since: float | None = None
        self.server_since = 0.0
        self.longest_claim = 0.0
        self.longest_locked = 0.0
        self.longest_wait = 0.0
        self.longest_suspect = 0.0
        self.ready_since: float | None = None
        self.longest_delay = 0.0
        self.delayed = ""
        self.failure: BaseException | None = None
        self._world = world
        self._ended: dict[str, tuple[int, float]] = {}  # by id: the attempt, and the lease's end
        self._locked: set[str] = set()  # of these, the ids whose rows were seen locked
        self._due: dict[str, float] = {}  # by id: since when it was seen to be due
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor")

    def start(self) -> None:
        """Start sampling."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling."""
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._look_again_and_again()
        except BaseException as error:
            self.failure = error

    def _look_again_and_again(self) -> None:
        dsn = make_conninfo(self._world.dsn, application_name="test")
        while not self._end.is_set():
            with (
                contextlib.suppress(psycopg.OperationalError),  # it is away
                psycopg.connect(dsn, autocommit=True) as conn,
            ):
                while not self._end.wait(0.1):
                    self._look(conn)
            self._end.wait(0.1)

    def _look_for_delays(self, conn: psycopg.Connection[Any]) -> None:
        """Note for how long due jobs have waited that were never claimed."""
        rows = conn.execute(
            "select id, extract(epoch from clock_timestamp())::float8 from bgjob_job "
            "where attempt = 0 and token is null and next_run_at <= clock_timestamp()"
        ).fetchall()
        # Since it was seen, not since it was due: it may have been committed late.
        self._due = {id: self._due.get(id, now) for id, now in rows}
        ready_since = self.ready_since
        if ready_since is None:
            return
        for id, now in rows:
            delay = now - max(self._due[id], ready_since, self.server_since)
            if delay > self.longest_delay:
                self.longest_delay = delay
                self.delayed = f"{id} at {time.strftime('%H:%M:%S', time.gmtime(now))}"

    def _look(self, conn: psycopg.Connection[Any]) -> None:
        self._look_for_delays(conn)
        [[self.backlog]] = conn.execute(
            "select count(*) from bgjob_job where deaths <= 1"
        ).fetchall()
        rows = conn.execute(
            "select id, attempt, extract(epoch from lease_until)::float8,"
            " extract(epoch from clock_timestamp())::float8, deaths"
            " from bgjob_job where lease_until < clock_timestamp() or id = any(%s)",
            [list(self._ended)],
        ).fetchall()
        live = {row[0]: row[1:] for row in rows}
        for id, (attempt, ended_at) in list(self._ended.items()):
            found, lease_until, now, deaths = live.get(id, (None, None, 0.0, 0))
            if found is None:
                del self._ended[id]  # it was settled after all
            elif found != attempt or (lease_until is not None and lease_until > now):
                del self._ended[id]
                if not self._kills(id):
                    seconds = self._late(ended_at, now, self.ready_since)
                    if id in self._locked:
                        self.longest_locked = max(self.longest_locked, seconds)
                    elif deaths <= 1:
                        self.longest_wait = max(self.longest_wait, seconds)
                    else:
                        self.longest_suspect = max(self.longest_suspect, seconds)
        self._locked &= self._ended.keys()
        late = {}
        for id, (attempt, lease_until, now, _) in live.items():
            if lease_until is not None and lease_until < now:
                self._ended[id] = (attempt, lease_until)
                late[id] = self._late(lease_until, now, self.working_since)
        self._note_late(conn, late)

    def _note_late(self, conn: psycopg.Connection[Any], late: dict[str, float]) -> None:
        """Note how late these jobs are, whose leases have ended."""
        if max(late.values(), default=0.0) < 0.5:
            self.longest_claim = max(self.longest_claim, *late.values(), 0.0)
            return
        rows = conn.execute(
            "select id from bgjob_job where id = any(%s) for share skip locked", [[*late]]
        )
        free = {id for (id,) in rows}
        for id, seconds in late.items():
            if id in free:
                self.longest_claim = max(self.longest_claim, seconds)
            else:
                self._locked.add(id)
                self.longest_locked = max(self.longest_locked, seconds)

    def _late(self, ended_at: float, now: float, since: float | None) -> float:
        """Seconds since a job's lease has ended, the server is up, and a worker works `since`."""
        return 0.0 if since is None else max(now - max(ended_at, since, self.server_since), 0.0)

    def _kills(self, id: str) -> bool:
        job = self._world.jobs.get(id)
        return job is not None and job.arg.get("then") == "kill"


# -- workers -------------------------------------------------------------------------------


@dataclass(slots=True)
class Recovery:
    """The return of something; what starts a job next?"""

    what: Literal["server", "network"]
    at: float
    pid: int | None = None
    until: float | None = None
    """When the next fault came in between."""


@dataclass
class Slot:
    """A place for a worker process, filled again when its process has died."""

    colour: Colour
    proxy: Proxy | None
    process: Process | None = None
    runs: bool = False
    """Whether the process has reported that it runs."""
    start_at: float = 0.0
    asked_at: float | None = None
    """When the process was asked to end."""
    is_killed: bool = False
    """Whether the process was killed from here."""
    is_cut_off: bool = False
    recovery: Recovery | None = None

    @property
    def in_flight(self) -> set[str]:
        """The jobs that its process has started, and whose end it has not reported."""
        running: set[str] = set()
        for name, *details in self.process.events() if self.process is not None else ():
            if name == "started":
                running.add(details[0])
            elif name in ("completed", "retried", "rescheduled", "dead", "lost"):
                running.discard(details[0])
        return running

    @property
    def works(self) -> bool:
        """Whether it can take a job."""
        return self.is_ready and not self.is_cut_off

    @property
    def is_ready(self) -> bool:
        """Whether its process runs, and is to go on."""
        return (
            self.runs and self.asked_at is None and self.process is not None and self.process.runs
        )


@dataclass
class Report:
    """The faults of the long run, and their outcome."""

    happened: Counter[str] = field(default_factory=Counter)
    jobs: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    innocents: list[str] = field(default_factory=list)
    wrong_ends: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    longest: dict[str, float] = field(default_factory=dict)
    delayed: str = ""
    """The innocent job that was delayed for longest."""

    def text(self) -> str:
        """All of it, a line each."""
        lines = [f"{self.jobs[what]:9,} {what}" for what in self.jobs]
        lines += [
            f"{self.happened[what]:9,} {what}" for what in sorted(self.happened, key=str.lower)
        ]
        for what, found in (
            ("lost", self.lost),
            ("duplicated effects", self.duplicated),
            ("innocents in the dead-letter table", self.innocents),
            ("workers that ended as they should not", self.wrong_ends),
            ("workers that did not work again", self.stuck),
        ):
            lines.append(f"{len(found):9,} {what}" + "".join(f"\n          {f}" for f in found[:5]))
        lines += [f"{seconds:9.2f} s {what}" for what, seconds in self.longest.items()]
        return "\n".join([*lines, "", *self._summary()])

    def _summary(self) -> list[str]:
        """The most important figures, a line each."""
        kills = self.happened["kills"] + self.happened["workers killed by their jobs"]
        counts = {
            "jobs": self.jobs["jobs acknowledged"] + self.jobs["jobs that jobs enqueued"],
            "kills": kills,
            "restarts of the server": self.happened["server restarts"],
            "graceful ends": self.happened["graceful ends"],
            "lost": len(self.lost),
            "doubled transactional effects": len(self.duplicated),
        }
        lines = [f"{count:9,} {what}" for what, count in counts.items()]
        return [
            *lines,
            f"{self.longest[RECOVERY]:9.2f} s longest recovery, {RECOVERY}",
            f"{self.longest[SUSPECT]:9.2f} s {SUSPECT}",
            f"{self.longest[DELAY]:9.2f} s longest delay of an innocent, {DELAY} {self.delayed}",
        ]

    @property
    def is_good(self) -> bool:
        """Whether no promise was broken."""
        return not (self.lost or self.duplicated or self.innocents or self.wrong_ends or self.stuck)


class Soak:
    """All faults together, for as long as you like.

    Args:
        world: on the server.
        server: to be hurt.
        seed: of what happens, and when; not of how threads and processes meet.
        seconds: until peace.
        say: is told now and then how far it is.

    """

    def __init__(
        self,
        world: World,
        server: EmbeddedServer,
        *,
        seed: int,
        seconds: float,
        say: Callable[[str], object],
    ) -> None:
        self.report = Report()
        self._world = world
        self._server = server
        self._dice = random.Random(f"{seed}/faults")
        self._seed = seed
        self._seconds = seconds
        self._say = say
        self._monitor = Monitor(world)
        self._endings: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._recoveries: list[Recovery] = []
        self._producers: list[Producer] = []
        self._producers_are_cut_off = False
        self._is_over = False
        self._traps: list[tuple[str, threading.Event]] = []

    def run(self) -> Report:
        """Run all faults, end them, and check the outcome."""
        world = self._world
        world.lease, world.poll_interval = LEASE, POLL_INTERVAL
        world.query(INDEXES)
        world.query(DEFAULTS.format(world.value("select quote_ident(current_database())")))
        with contextlib.ExitStack() as stack:
            proxies = [stack.enter_context(Proxy(world.dsn)) for _ in range(3)]
            self._slots = [
                Slot("thread", None),
                Slot("async", None),
                Slot("thread", proxies[0]),
                Slot("async", proxies[1]),
            ]
            self._proxies = proxies
            self._produce(stack, proxies[2])
            stack.callback(self._stop)
            self._monitor.start()
            for producer in self._producers:
                producer.start()
            self._rage()
            self._pacify()
        self._judge()
        return self.report

    def _produce(self, stack: contextlib.ExitStack, proxy: Proxy) -> None:
        """Set up the producers: each way of enqueuing, with and without a network between."""
        world = self._world
        direct, through = world.dsn, proxy.dsn(world.dsn)
        plain = stack.enter_context(Client(through))
        coroutine = AsyncClient(through)
        world.run(_nothing())  # its loop is there before threads ask for it
        stack.callback(lambda: world.run(coroutine.close()))

        def one_by_one(requests: list[EnqueueRequest]) -> None:
            if len(requests) == 1:
                plain.enqueue(requests[0])
            else:
                plain.bulk_enqueue(requests)

        def awaited(requests: list[EnqueueRequest]) -> None:
            world.run(coroutine.bulk_enqueue(requests))

        def in_a_transaction(requests: list[EnqueueRequest]) -> None:
            with psycopg.connect(direct, connect_timeout=10) as conn:
                conn.execute("select txid_current()")
                world.client.bulk_enqueue(requests, conn=conn)

        def here(requests: list[EnqueueRequest]) -> None:
            world.client.bulk_enqueue(requests)

        ways = {"a": one_by_one, "b": awaited, "c": in_a_transaction, "d": here}
        for name, way in ways.items():
            dice = random.Random(f"{self._seed}/{name}")
            producer = Producer(name, world, dice, way, self._has_room)
            self._producers.append(producer)
        # Its thread is never started: the main one has it enqueue the killers.
        self._killers = Producer("k", world, random.Random(f"{self._seed}/k"), here, self._has_room)

    def _has_room(self) -> bool:
        return self._monitor.backlog < BACKLOG

    # -- the rage ---------------------------------------------------------------------------

    def _rage(self) -> None:
        began = time.time()
        next_fault = began + self._dice.expovariate(1 / GAP)
        next_killer = began + self._dice.uniform(3, 10)
        next_crowd = began + self._dice.uniform(10, 20)
        next_word = began + 60
        while (now := time.time()) < began + self._seconds:
            self._tick(now)
            if now >= next_fault:
                self._hurt(now)
                next_fault = time.time() + self._dice.expovariate(1 / GAP)
            if now >= next_killer:
                kind = self._dice.choice(["plain", "transactional"])
                self._killers.produce(kind, {"then": "kill"})
                next_killer = now + self._dice.uniform(0.7, 1.3) * KILLER_EVERY
            if now >= next_crowd:
                self._gather_a_crowd(now)
                next_crowd = now + self._dice.uniform(0.7, 1.3) * CROWD_EVERY
            if now >= next_word:
                self._say(f"{now - began:.0f} s, {len(self._world.jobs):,} jobs")
                next_word += 60
            time.sleep(0.05)

    def _end_faults(self, now: float = float("inf")) -> None:
        """End those whose time is over; all, if no time is given."""
        self._is_over = now == float("inf")
        while self._endings and self._endings[0][0] <= now:
            heapq.heappop(self._endings)[2]()

    def _tick(self, now: float) -> None:
        self._end_faults(now)
        for slot in self._slots:
            self._fill(slot, now)
        working = any(slot.works for slot in self._slots[:2])
        if not working:
            self._monitor.working_since = None
        elif self._monitor.working_since is None:
            self._monitor.working_since = now
        # The one that no network lies before, and that has slots free.
        direct = self._slots[1]
        if not direct.works:
            self._monitor.ready_since = None
        elif self._monitor.ready_since is None:
            self._monitor.ready_since = now
        parts: list[Monitor | Producer] = [self._monitor, *self._producers]
        for part in parts:
            if part.failure is not None:
                raise part.failure

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._endings, (when, next(self._order), what))

    def _fill(self, slot: Slot, now: float) -> None:
        """Make sure that there is a worker."""
        process = slot.process
        if process is None:
            if now >= slot.start_at:
                slot.process = self._start(slot)
                slot.asked_at, slot.is_killed = None, False
        elif not process.alive:
            self._disturb(slot)
            self._dead_letter(slot, process)
            slot.process, slot.runs = None, False
            slot.start_at = now + self._dice.uniform(0, 1)
        elif not slot.runs:
            slot.runs = "is running" in process.output

    def _start(self, slot: Slot) -> Process:
        self.report.happened["worker processes"] += 1
        return self._world.command(
            "-m",
            "bgjob",
            "worker",
            "faults.app:make",
            "--grace",
            str(GRACE),
            dsn=self._world.dsn if slot.proxy is None else slot.proxy.dsn(self._world.dsn),
            colour=slot.colour,
            concurrency=SLOTS[slot.colour],
            max_attempts=MAX_ATTEMPTS,
            backoff=0.2,
            grace=GRACE,
        )

    def _dead_letter(self, slot: Slot, process: Process) -> None:
        """Check how a process has ended."""
        code, asked_at = process.wait(), slot.asked_at
        if code == -signal.SIGKILL:
            self.report.happened["workers killed by their jobs"] += not slot.is_killed
        elif asked_at is not None and code == 0:
            self.report.happened["graceful ends"] += 1
            self.report.happened["graceful ends within jobs"] += bool(slot.in_flight)
            self._note("from SIGTERM to a worker's end", time.time() - asked_at)
        elif code == 1 and asked_at is None and "is running" not in process.output:
            self.report.happened["starts that found no server"] += 1
        else:
            self.report.wrong_ends.append(f"exit code {code}: {process.output[-1000:]}")

    def _note(self, what: str, seconds: float) -> None:
        self.report.longest[what] = max(self.report.longest.get(what, 0.0), seconds)

    def _disturb(self, slot: Slot) -> None:
        """Record that from now on the slot's last recovery is not expected."""
        if slot.recovery is not None:
            slot.recovery.until = time.time()
            slot.recovery = None

    # -- faults -------------------------------------------------------------------------------

    def _hurt(self, now: float) -> None:
        faults: dict[Callable[[float], bool], float] = {
            self._kill: 5,
            self._stop_for_a_while: 3,
            self._terminate: 3,
            self._restart_server: 1,
            self._take_server_away: 0.5,
            self._end_sessions: 2,
            self._silence: 1.5,
            self._cut: 2,
            self._cut_at_commit: 3,
        }
        while not self._dice.choices([*faults], [*faults.values()])[0](now):
            pass

    def _victim(self, *, running: bool) -> Slot | None:
        """Choose a worker; with `running` one that works and was not asked to end."""
        slots = [
            slot
            for slot in self._slots
            if slot.process is not None
            and slot.process.alive
            and not slot.is_killed
            and (slot.is_ready or not running)
        ]
        return self._dice.choice(slots) if slots else None

    def _kill(self, _: float) -> bool:
        slot = self._victim(running=False)
        if slot is None or slot.process is None:
            return False
        self._disturb(slot)
        slot.is_killed = True
        slot.process.signal(signal.SIGKILL)
        self.report.happened["kills"] += 1
        return True

    def _stop_for_a_while(self, now: float) -> bool:
        slot = self._victim(running=True)
        if slot is None or slot.process is None:
            return False
        process = slot.process
        self._disturb(slot)
        # Not Process.stop(), which waits: a job of its own may kill it now.
        process.signal(signal.SIGSTOP)
        process.is_stopped = True
        self._at(now + self._dice.uniform(1.2, 3) * LEASE, process.cont)
        self.report.happened["stops for longer than the lease"] += 1
        return True

    def _terminate(self, now: float) -> bool:
        slot = self._victim(running=True)
        if slot is None or slot.process is None:
            return False
        self._disturb(slot)
        slot.asked_at = now
        slot.process.terminate()
        self.report.happened["SIGTERMs"] += 1
        return True

    def _gather_a_crowd(self, now: float) -> None:
        """Have many jobs in flight in two workers, and kill both."""
        for _ in range(8):  # which do not all open their connections in one moment
            self._killers.produce("plain", {"sleep": self._dice.uniform(4, 7)}, count=CROWD // 8)
        slots, patience = [self._slots[1], self._slots[3]], now + 10

        def kill() -> None:
            victims = [slot for slot in slots if slot.process is not None and slot.process.alive]
            flying = sum(len(slot.in_flight) for slot in victims)
            if flying < IN_FLIGHT and time.time() < patience and not self._is_over:
                self._at(time.time() + 0.2, kill)
                return
            for slot in victims:
                self._disturb(slot)
                slot.is_killed = True
                slot.process.signal(signal.SIGKILL)  # type: ignore[union-attr]
            self.report.happened["kills"] += len(victims)
            if len(victims) == len(slots):
                self.report.happened["two workers killed at once"] += 1
                most = "jobs in flight at most in two workers killed at once"
                self.report.happened[most] = max(self.report.happened[most], flying)

        self._at(now + 1.0, kill)

    def _take_server_away(self, now: float) -> bool:
        """Stop the server for longer than the lease."""
        return self._restart(
            now, self._dice.uniform(1.5, 3) * LEASE, "server away for longer than the lease"
        )

    def _restart_server(self, now: float) -> bool:
        return self._restart(now, self._dice.uniform(0, 2))

    def _restart(self, _: float, away: float, what: str | None = None) -> bool:
        mode: Literal["fast", "immediate"] = self._dice.choice(["fast", "immediate"])
        for recovery in self._recoveries:
            recovery.until = recovery.until or time.time()
        for slot in self._slots:
            slot.recovery = None
        self._server.stop(mode)
        time.sleep(away)
        self._server.start()
        self._monitor.server_since = time.time()
        self._recoveries.append(Recovery("server", time.time()))
        self.report.happened[what or f"server restarts, {mode}"] += 1
        self.report.happened["server restarts"] += 1
        return True

    def _end_sessions(self, _: float) -> bool:
        rows = self._world.query(
            "select pid from pg_stat_activity where datname = current_database() "
            "and backend_type = 'client backend' and application_name <> 'test' order by pid"
        )
        victims = self._dice.sample(rows, min(len(rows), self._dice.randint(1, 3)))
        self._world.query(
            "select pg_terminate_backend(pid) from unnest(%s::int[]) pid",
            [[pid for (pid,) in victims]],
        )
        self.report.happened["sessions ended"] += len(victims)
        return True

    def _network(self) -> tuple[Proxy, Slot | None] | None:
        """Choose a working network, in front of a worker or of the producers."""
        slots = {slot.proxy: slot for slot in self._slots if slot.proxy is not None}
        whole = [p for p in self._proxies if p not in slots or not slots[p].is_cut_off]
        whole = [p for p in whole if p in slots or not self._producers_are_cut_off]
        if not whole:
            return None
        proxy = self._dice.choice(whole)
        return proxy, slots.get(proxy)

    def _lose(self, now: float, lose: Callable[[Proxy], None], seconds: float) -> bool:
        """Lose a network for so long."""
        chosen = self._network()
        if chosen is None:
            return False
        proxy, slot = chosen
        if slot is None:
            self._producers_are_cut_off = True
        else:
            self._disturb(slot)
            slot.is_cut_off = True
        lose(proxy)
        old: Literal["reset", "dead"] = self._dice.choice(["reset", "dead"])

        def restore() -> None:
            proxy.forward(old=old)
            if slot is None:
                self._producers_are_cut_off = False
            else:
                slot.is_cut_off = False
                if slot.works and slot.process is not None:
                    slot.recovery = Recovery("network", time.time(), slot.process.pid)
                    self._recoveries.append(slot.recovery)

        self._at(now + seconds, restore)
        return True

    def _silence(self, now: float) -> bool:
        happened = self._lose(now, Proxy.silence, self._dice.uniform(1, 15))
        self.report.happened["networks gone silent"] += happened
        return happened

    def _cut(self, now: float) -> bool:
        happened = self._lose(now, Proxy.cut, self._dice.uniform(0.2, 3))
        self.report.happened["networks cut"] += happened
        return happened

    def _cut_at_commit(self, _: float) -> bool:
        proxy = self._dice.choice(self._proxies)
        side = self._dice.choice(["before", "after"])
        trap = proxy.cut_before_commit() if side == "before" else proxy.cut_after_commit()
        self._traps.append((f"connections cut {side} a commit", trap))
        return True

    # -- peace --------------------------------------------------------------------------------

    def _pacify(self) -> None:
        """End all faults, and wait until the queue is empty."""
        peace_at = time.time()
        for producer in self._producers:
            producer.end()
        self._end_faults()
        for recovery in self._recoveries:
            recovery.until = recovery.until or peace_at
        deadline = time.monotonic() + PEACE
        while any(producer.is_alive for producer in self._producers) or self._world.live():
            assert time.monotonic() < deadline, (
                f"{self._world.live()} jobs are live after {PEACE:g} s of peace, such as "
                f"{self._world.query('select * from bgjob_job order by next_run_at limit 10')}"
            )
            self._tick(time.time())
            time.sleep(0.05)
        self._note("from peace to an empty queue", time.time() - peace_at)

    def _stop(self) -> None:
        """Stop the threads of this process; the world ends the workers."""
        self._end_faults()
        self._monitor.stop()
        for producer in (*self._producers, self._killers):
            producer.join()

    # -- the ledger ---------------------------------------------------------------------------

    def _judge(self) -> None:
        """Check the outcome; the oracle checks it again."""
        world, report = self._world, self.report
        ledger = {
            (id, kind): rows
            for id, kind, rows in world.query(
                "select job_id, kind, count(*) from ledger group by job_id, kind"
            )
        }
        dead = {id for (id,) in world.query("select distinct job_id from bgjob_dead_job")}
        jobs, beyond = report.jobs, 0
        jobs["jobs acknowledged"] = len(world.jobs)
        for what in ("ordinary", "transactional", "to be retried", "killers", "killers that died"):
            jobs[f"  {what}"] = 0
        for job in world.jobs.values():
            rows, then = ledger.get((job.id, job.type), 0), job.arg.get("then")
            jobs["  ordinary" if job.type == "plain" else "  transactional"] += 1
            jobs["  to be retried"] += then in ("retry", "raise")
            if not rows and job.id not in dead:
                report.lost.append(f"{job}")
            if then == "kill":
                jobs["  killers"] += 1
                jobs["  killers that died"] += job.id in dead
            elif job.id in dead and then != "dlq":
                report.innocents.append(f"{job}")
            elif job.type == "transactional" and rows > 1:
                report.duplicated.append(f"{job}: {rows} ledger rows")
            elif job.type == "plain":
                beyond += max(rows - self._wanted_rows(job), 0)
        children = [(id, rows) for (id, _), rows in ledger.items() if "/" in id]
        jobs["jobs that jobs enqueued"] = len(children)
        report.innocents += [id for id in dead if "/" in id]
        beyond += sum(rows - 1 for _, rows in children)
        report.happened["runs of ordinary jobs beyond one"] = beyond
        for producer in (*self._producers, self._killers):
            jobs["  delayed"] += producer.counts["delayed"]
            jobs["  in bulk"] += producer.counts["bulk"]
            for what in ("enqueues without an answer", "and yet written"):
                report.happened[what] += producer.counts[what]
        for what, trap in self._traps:
            report.happened[what] += trap.is_set()
        for process in world.processes:
            for name, what in (("lost", "leases lost, as a worker said"), ("error", "errors told")):
                report.happened[what] += len(process.of(name))
        self._judge_recoveries()

    def _wanted_rows(self, job: Acknowledged) -> int:
        """How many ledger rows an ordinary job writes where nothing goes wrong."""
        return int(job.arg.get("until", 1))

    def _judge_recoveries(self) -> None:
        report, monitor = self.report, self._monitor
        self._note("from a lease's end until its job was freed", monitor.longest_claim)
        self._note(
            "until it was freed, or claimed again, where a session had locked the row",
            monitor.longest_locked,
        )
        self._note(RECOVERY, monitor.longest_wait)
        self._note(SUSPECT, monitor.longest_suspect)
        self._note(DELAY, monitor.longest_delay)
        report.delayed = monitor.delayed
        for recovery in self._recoveries:
            [[found]] = self._world.query(
                "select extract(epoch from min(at))::float8 from ledger "
                "where at > to_timestamp(%s) and at < to_timestamp(%s) and pid = coalesce(%s, pid)",
                [recovery.at, recovery.until, recovery.pid],
            )
            assert recovery.until is not None
            if found is not None:
                self._note(f"from the {recovery.what}'s return to a job", found - recovery.at)
            elif recovery.until - recovery.at > 2 * NETWORK_LIMIT:
                report.stuck.append(f"{recovery}")


async def _nothing() -> None:
    pass
