"""The ClientApp: which message is answered by what. Flower starts a process for each of them."""

import json
from collections.abc import Callable
from typing import Any

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from ..privacy.masks import MaskFault
from .site import Content, Site, answer

client_app = ClientApp()
Answering = Callable[[Message, Context], Message]


def with_films(name: str) -> Answering:
    """Return what lets a function of `hospital`, which takes seconds to import, answer."""

    def answer_there(message: Message, context: Context) -> Message:
        """Answer with the films of this hospital."""
        from . import hospital

        return getattr(hospital, name)(message, context)

    return answer_there


def of_masks(work: Callable[[Site], Any]) -> Answering:
    """Let a function answer that needs no films; what masks must not forget is written first."""

    def say(order: ConfigRecord, node: dict[str, Any]) -> tuple[dict[str, str], Content]:
        """Return as text what the function says."""
        return {"said": json.dumps(work(Site(order, node)))}, {}

    return lambda message, context: answer(message, context, say)


@client_app.query("offer")
@of_masks
def offer(here: Site) -> dict[str, Any]:
    """Offer a key for one masked sum, and shares of what takes its mask off."""
    what, introduced = here.sum_asked_for(here.order["kind"]), json.loads(here.order["introduced"])
    if sorted(introduced) != here.masks["members"]:
        raise MaskFault("the members of the sum are not those who are introduced")
    with here.masking() as masker:
        return masker.offer(what, introduced) | {"what": what}


@client_app.query("agree")
@of_masks
def agree(here: Site) -> dict[str, str]:
    """Sign the list of those whose numbers are in a sum."""
    with here.masking() as masker:  # which writes before it leaves
        return {"signature": masker.agree(here.order["what"], json.loads(here.order["survivors"]))}


@client_app.query("reveal")
@of_masks
def reveal(here: Site) -> dict[str, str]:
    """Give the shares that take the masks off a sum whose list enough have signed."""
    with here.masking() as masker:
        return masker.reveal(here.order["what"], json.loads(here.order["signatures"]))


def tell(message: Message, context: Context) -> Message:
    """Describe the films of this hospital."""
    from . import survey  # which takes seconds to import

    return survey.tell_films(message, context)


client_app.query()(with_films("introduce"))
client_app.query("survey")(tell)
client_app.query("count")(with_films("count"))
client_app.train()(with_films("fit"))
client_app.train("measure")(with_films("batchnorm"))
client_app.evaluate()(with_films("validate"))
client_app.evaluate("span")(with_films("count_span"))
client_app.evaluate("grid")(with_films("count_grid"))
client_app.evaluate("draws")(with_films("count_draws"))
