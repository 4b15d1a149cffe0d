from asgiref.sync import sync_to_async
from django.db import transaction
from django.http import HttpResponse
from shop.models import Order

from bgjob import EnqueueRequest
from bgjob.ext.django import aenqueue, enqueue


@transaction.atomic
def order(request, number):
    Order.objects.create(number=number)
    enqueue(EnqueueRequest("mail", "confirm", {"order": number}, id=number))
    if "fail" in request.GET:
        transaction.set_rollback(True)
    return HttpResponse("ordered")


async def async_order(request, number):
    if "together" in request.GET:
        return await sync_to_async(order)(request, number)
    return HttpResponse(await aenqueue(EnqueueRequest("mail", "confirm", id=number)))
