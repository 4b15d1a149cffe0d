import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from flask import Blueprint, Flask, current_app, g
from sqlalchemy import create_engine, make_url, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from bgjob import Client, EnqueueRequest, Job, Mux, Worker
from bgjob.ext.sqlalchemy import enqueue

orders = Blueprint("orders", __name__, url_prefix="/orders")


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    confirmed: Mapped[bool] = mapped_column(default=False)


def create_app() -> Flask:
    app = Flask(__name__)
    url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+psycopg")
    app.extensions["engine"] = create_engine(url)
    app.teardown_appcontext(close_session)
    app.register_blueprint(orders)
    return app


def session() -> Session:
    """Return the session of the app context: of a request, or of a job."""
    if "session" not in g:
        g.session = Session(current_app.extensions["engine"])
    return g.session


def close_session(error: BaseException | None) -> None:
    if "session" in g:
        g.pop("session").close()  # rolls back what was not committed


@orders.post("")
def place_order() -> tuple[dict[str, int], int]:
    order = Order()
    session().add(order)
    session().flush()  # the order gets its id
    enqueue(session(), EnqueueRequest("mail", "confirm", {"order": order.id}))
    session().commit()  # the order and its job
    return {"id": order.id}, 201


@orders.get("/confirmed")
def confirmed_orders() -> list[int]:
    return list(session().scalars(select(Order.id).where(Order.confirmed)))


def confirm(job: Job) -> None:
    order = job.json()["order"]
    session().execute(update(Order).where(Order.id == order).values(confirmed=True))
    session().commit()


def create_worker(dsn: str, queues: dict[str, int]) -> Worker:
    app = create_app()

    def in_app_context(handler: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(handler)
        def call(*args: Any) -> Any:
            with app.app_context():
                return handler(*args)

        return call

    mux = Mux(middleware=[in_app_context]).register("confirm", confirm)
    return Worker(Client(dsn), queues, mux)
