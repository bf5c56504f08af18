"""The pictures of a request, opened before anybody waits for them: not in the thread that holds the model."""

from dataclasses import replace
from typing import TypeGuard

from ..errors import PromptError
from ..text.pictures import parts
from ..text.pictures.sources import Access
from .exchange import Conversation, Decisions, Order, Refused, Served

HERE = Access(files=False, urls=False)  # a request brings its pictures along: no file is opened for it, no URL fetched


def wanted(order: Order | Decisions) -> TypeGuard[Order]:
    """Whether an order has pictures."""
    return isinstance(order, Order) and isinstance(order.of, Conversation) and parts.has_pictures(order.of.messages)


def opened(order: Order, served: Served, access: Access) -> Order:
    """The same order with its pictures scaled. Errors: Refused for one that cannot be read, or is not allowed, and
    where the model has no eyes."""
    of = order.of
    if served.pictures is None:
        raise Refused("This model has no vision tower: it reads text alone. Leave the pictures out.", param="messages")
    if not isinstance(of, Conversation):
        return order
    if parts.has_pictures(of.messages, parts.MEDIA):
        raise Refused("Videos and PDFs are not read here: send frames and pages as pictures.", param="messages")
    try:
        return replace(order, of=replace(of, messages=parts.opened(of.messages, served.pictures, access=access)))
    except PromptError as error:
        raise Refused(str(error), param="messages") from None
