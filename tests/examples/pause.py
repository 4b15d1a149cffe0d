import os

from bgjob import Client, EmptyQueueError, EnqueueRequest, Mux

mux = Mux().register("mail", lambda job: print("sending", job.id))

with Client(os.environ["DATABASE_URL"]) as client:
    client.pause("paused")
    client.enqueue(EnqueueRequest("paused", "mail", id="letter"))
    print(client.paused())
    try:
        client.do("paused", mux)
    except EmptyQueueError as error:
        print(error)
    print("was paused:", client.resume("paused"))
    client.do("paused", mux)
