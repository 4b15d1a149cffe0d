import os

import psycopg
from sqlalchemy import create_engine, make_url, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from bgjob import Client, EnqueueRequest, Job, Mux
from bgjob.ext.sqlalchemy import dsn, enqueue, session_of

url = make_url(os.environ["DATABASE_URL"])  # postgresql://...
engine = create_engine(url.set(drivername="postgresql+psycopg"))
mux = Mux()


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    confirmed: Mapped[bool] = mapped_column(default=False)


@mux.handler("confirm", transactional=True)
def confirm(job: Job, conn: psycopg.Connection) -> None:
    with session_of(conn) as session:
        order = session.scalars(select(Order).where(Order.id == job.json()["order"])).one()
        order.confirmed = True
        enqueue(session, EnqueueRequest("mail", "thank", {"order": order.id}))


Base.metadata.create_all(engine)
with Session(engine) as session:
    order = Order()
    session.add(order)
    session.flush()  # the order gets its id
    enqueue(session, EnqueueRequest("mail", "confirm", {"order": order.id}))
    session.commit()  # the order and its job

with Client(dsn(engine)) as client:
    client.do("mail", mux)
    print("jobs:", [stats.type for stats in client.stats("mail")])
with Session(engine) as session:
    print("confirmed:", session.scalar(select(Order.confirmed)))
engine.dispose()
