"""The tasks of Django's own documentation, and others."""

import logging

import django
from asgiref.sync import sync_to_async
from django.core.mail import send_mail
from django.db import transaction

if django.VERSION >= (6,):
    from django.tasks import task
else:
    from django_tasks import task

logger = logging.getLogger(__name__)
CALLS = []


# https://docs.djangoproject.com/en/6.0/topics/tasks/
@task
def email_users(emails, subject, message):
    return send_mail(subject=subject, message=message, from_email=None, recipient_list=emails)


@task(priority=2, queue_name="emails")
def email_emails(emails, subject, message):
    return send_mail(subject=subject, message=message, from_email=None, recipient_list=emails)


@task(takes_context=True)
def email_with_context(context, emails, subject, message):
    logger.debug(
        f"Attempt {context.attempt} to send user email. Task result id: {context.task_result.id}."
    )
    CALLS.append((context.attempt, context.task_result.id, list(context.task_result.errors)))
    return send_mail(subject=subject, message=message, from_email=None, recipient_list=emails)


@task()
def my_task(foo, bar=None):
    CALLS.append((foo, bar))


@task
async def async_task(number):
    from shop.models import Order

    await sync_to_async(Order.objects.create)(number=number)


@task(takes_context=True)
def fails(context):
    CALLS.append((context.attempt, [error.exception_class for error in context.task_result.errors]))
    raise ValueError("no")


@task(backend="once")
def fails_once():
    raise ValueError("no")


@task
def process_thing(thing_num):
    from shop.models import Order

    with transaction.atomic():
        CALLS.append(Order.objects.get(number=thing_num).number)


@task(backend="kept")
def adds(first, second=0):
    return {"sum": first + second, "of": (first, second)}


@task(backend="kept")
async def adds_later(first, second):
    return first + second


@task(backend="kept", takes_context=True)
def fails_twice(context):
    raise ValueError(f"no {context.attempt}")


@task(backend="kept")
def returns_no_json():
    return object()
