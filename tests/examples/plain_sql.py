import os

import psycopg

from bgjob import Client, Job, Mux

TRIGGER = """
    create table orders (id int primary key);

    create function enqueue_confirmation() returns trigger language plpgsql as $$
    begin
        insert into bgjob_job (queue, type, arg)
        values ('mail', 'confirm', convert_to(json_build_object('order', new.id)::text, 'UTF8'));
        perform pg_notify('bgjob', 'mail');
        return null;
    end $$;

    create trigger confirmation after insert on orders
        for each row execute function enqueue_confirmation();
"""

mux = Mux()


@mux.handler("confirm")
def confirm(job: Job) -> None:
    print("confirming order", job.json()["order"])


with psycopg.connect(os.environ["DATABASE_URL"]) as conn:
    conn.execute(TRIGGER)
    conn.execute("insert into orders (id) values (1), (2)")

with Client(os.environ["DATABASE_URL"]) as client:
    for _ in range(2):
        client.do("mail", mux)
