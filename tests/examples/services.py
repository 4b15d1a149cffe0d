import os
import threading

import psycopg

from bgjob import Client, Mux, Worker

counted = threading.Event()


class CountTheDead:
    def run(self, conn: psycopg.Connection, /) -> float:
        [(count,)] = conn.execute("select count(*) from bgjob_dead_job").fetchall()
        if not counted.is_set():
            print("dead jobs:", count)
        counted.set()
        return 60.0


client = Client(os.environ["DATABASE_URL"])
with Worker(client, "mail", Mux(), services=[CountTheDead()]):
    counted.wait()
client.close()
