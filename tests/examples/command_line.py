import os

from bgjob import Client, Mux
from bgjob.cli import main  # finds the database in DATABASE_URL

main(["enqueue", "mail", "confirm", '{"order": 2}', "--id", "order-2", "--priority", "-1"])

with Client(os.environ["DATABASE_URL"]) as client:
    client.do("mail", Mux())  # no handler is registered

status = main(["dlq", "requeue", "--queue", "mail", "--json"])
print("exit status", status)
main(["dlq", "purge", "--older-than", "30d"])
