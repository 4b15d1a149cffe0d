import os

from bgjob import Client, EnqueueRequest

with Client(os.environ["DATABASE_URL"]) as client:
    client.pause("letters")
    client.enqueue(EnqueueRequest("letters", "letter", id="urgent", priority=-1))
    client.enqueue(EnqueueRequest("letters", "letter", id="letter-1"))

    explanation = client.explain("letter-1")
    print(f"{explanation.id} is {explanation.state}")
    for reason in explanation.reasons:
        print(f"{reason.code}{' (blocks)' if reason.blocks else ''}: {reason.text}")
        print(f"    {reason.remedy}")
    print("the oldest due job is", client.explain(queue="letters").id)
