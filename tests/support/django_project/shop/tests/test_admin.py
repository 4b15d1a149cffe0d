"""The admin: what it shows, what it does, and who may do that."""

import re

from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import TestCase
from django.test.utils import CaptureQueriesContext

from bgjob import EnqueueRequest
from bgjob.ext.django import admin, enqueue
from bgjob.ext.django.models import DeadJob, Job, Queue

HOSTILE = "<script>alert('x')</script> %s {{ x }}"


def sql(text, *params):
    with connection.cursor() as cursor:
        cursor.execute(text, params)


def kill(*ids):
    for id in ids:
        sql(
            "insert into bgjob_dead_job (job_id, queue, type, arg, attempt, last_error, priority,"
            " next_run_at, job_created_at, job_updated_at) values"
            " (%s, 'q', 't', '[1]', 3, %s, 7, 'infinity', now(), now())",
            id,
            HOSTILE,
        )


class Admin(TestCase):
    def log_in(self, *permissions):
        user = User.objects.create_user("ann", is_staff=True, is_superuser=not permissions)
        user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
        self.client.force_login(user)

    def get(self, path, **query):
        found = self.client.get(f"/admin/bgjob/{path}", query)
        return found.status_code, found.content.decode()

    def act(self, path, action, rows):
        data = {"action": action, "_selected_action": [row.pk for row in rows]}
        found = self.client.post(f"/admin/bgjob/{path}/", data, follow=True)
        return found.content.decode()

    def test_jobs_are_shown_whatever_they_hold(self):
        self.log_in()
        payloads = [None, {"a": HOSTILE}, b"\xff<b>\0", b"[" * 3000, b"x" * 100_000]
        for n, arg in enumerate(payloads):
            enqueue(
                EnqueueRequest(
                    HOSTILE,
                    HOSTILE,
                    arg,
                    id=f"{HOSTILE}/{n}",
                    exclusive=HOSTILE,
                    headers={"x": HOSTILE},
                )
            )
        sql(
            "update bgjob_job set next_run_at = '-infinity', last_error = %s, checkpoint = arg,"
            " expires = 'infinity'",
            HOSTILE,
        )
        status, page = self.get("job/")
        self.assertEqual((status, "<script>alert" in page), (200, False))
        self.assertIn("&lt;script&gt;alert", page)
        self.assertIsNone(Job.objects.all()[0].lease_until)
        for job in Job.objects.all():
            status, page = self.get(f"job/{admin.admin.utils.quote(job.pk)}/change/")
            self.assertEqual((status, "<script>alert" in page, "<b>" in page), (200, False, False))
        self.assertEqual(page.count("100,000 bytes"), 2)  # also of the checkpoint
        self.assertIn("Expires:", page)
        self.assertLess(len(page), 70_000)
        self.assertIn("5 jobs", self.get("job/", queue=HOSTILE)[1])
        self.assertIn("1 result", self.get("job/", q=f"{HOSTILE}/1")[1])
        self.assertEqual(self.get("job/none/change/")[0], 302)
        kill("one")
        self.assertIn("1 dead job\n", self.get("deadjob/", queue="q")[1])
        sql("update bgjob_dead_job set checkpoint = '\"<b>\"', expires = '2000-01-02 12:00+00'")
        page = self.get(f"deadjob/{DeadJob.objects.get().pk}/change/")[1]
        self.assertIn("<pre>&quot;&lt;b&gt;&quot;</pre>", page)
        self.assertIn("Jan. 2, 2000", page)
        self.assertEqual(self.get("queue/")[0], 200)
        self.assertEqual(self.get("schedule/")[0], 200)

    def test_nothing_is_added_changed_or_deleted(self):
        self.log_in()
        enqueue(EnqueueRequest("q", "t", id="one"))
        kill("dead")
        for path in ("job/add/", "deadjob/add/", "queue/add/", "job/one/delete/"):
            self.assertEqual(self.get(path)[0], 403)
        self.client.post("/admin/bgjob/job/one/change/", {"queue": "other"})
        self.act("job", "delete_selected", Job.objects.all())
        self.act("deadjob", "delete_selected", DeadJob.objects.all())
        self.assertEqual((Job.objects.get().queue, DeadJob.objects.count()), ("q", 1))

    def test_selected_dead_jobs_are_requeued(self):
        self.log_in()
        kill("a", "b", "c", "c")
        enqueue(EnqueueRequest("q", "t", id="b"))
        page = self.act("deadjob", "requeue", DeadJob.objects.exclude(job_id="a"))
        self.assertIn("1 job was requeued. 1 stays dead: a live job has its id.", page)
        self.assertEqual(set(Job.objects.values_list("id", "priority")), {("b", 0), ("c", 7)})
        self.assertEqual(
            list(DeadJob.objects.order_by("id").values_list("job_id", flat=True)), ["a", "b", "c"]
        )
        self.assertEqual({entry.change_message for entry in LogEntry.objects.all()}, {"Requeued."})

    def test_queues_are_paused_and_resumed(self):
        self.log_in()
        enqueue(EnqueueRequest("q", "t"))
        enqueue(EnqueueRequest("r", "t", delay=60))
        self.act("queue", "pause", Queue.objects.filter(name="q"))
        self.assertEqual(
            list(Queue.objects.order_by("name").values_list("name", "is_paused", "due", "delayed")),
            [("q", True, 1, 0), ("r", False, 0, 1)],
        )
        self.act("queue", "resume", Queue.objects.filter(name="q"))
        self.assertFalse(Queue.objects.filter(is_paused=True).exists())

    def test_each_action_has_its_permission(self):
        self.log_in("view_deadjob", "view_queue")
        kill("dead")
        enqueue(EnqueueRequest("q", "t"))
        self.assertEqual(self.get("job/")[0], 403)
        self.assertEqual(self.get("deadjob/")[0], 200)
        self.assertNotIn("requeue", self.get("deadjob/")[1])
        self.act("deadjob", "requeue", DeadJob.objects.all())
        self.act("queue", "pause", Queue.objects.all())
        self.assertEqual((DeadJob.objects.count(), Job.objects.count()), (1, 1))
        self.assertFalse(Queue.objects.filter(is_paused=True).exists())
        User.objects.get().user_permissions.add(
            *Permission.objects.filter(codename__in=["requeue_deadjob", "pause_queue"])
        )
        self.act("deadjob", "requeue", DeadJob.objects.all())
        self.act("queue", "pause", Queue.objects.all())
        self.assertEqual((DeadJob.objects.count(), Job.objects.count()), (0, 2))
        self.assertTrue(Queue.objects.filter(is_paused=True).exists())

    def test_a_list_reads_a_few_rows_however_many_there_are(self):
        self.log_in()
        sql(
            "insert into bgjob_job (id, queue, type, arg) select 'job-' || n, 'q' || mod(n, 3), 't',"
            " repeat('x', 50)::bytea from generate_series(1, 30000) n"
        )
        sql("update bgjob_job set queue = 'rare' where id = 'job-5'")
        sql("analyze bgjob_job")
        with CaptureQueriesContext(
            connection,
        ) as queries:
            status, page = self.get("job/", p=3)
            rare = self.get("job/", queue="rare")[1]
        self.assertEqual(status, 200)
        self.assertIn("10000 jobs", page)
        self.assertIn("1 job\n", rare)
        for query in queries.captured_queries:
            text = query["sql"]
            if "bgjob_job" in text and "bgjob_pause" not in text:
                with connection.cursor() as cursor:
                    cursor.execute(f"explain (analyze, buffers off, timing off) {text}")
                    plan = "\n".join(line for (line,) in cursor.fetchall())
                most = 1 if "rare" in text else 10_000
                read = [float(n) for n in re.findall(r"actual rows=([\d.]+)", plan)]
                self.assertLessEqual(max(read), most, plan)
                self.assertNotIn('"arg"', text)
                self.assertNotIn('"checkpoint"', text)
