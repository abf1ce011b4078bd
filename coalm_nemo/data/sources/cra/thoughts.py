"""The two thoughts of a turn, in words of our own, from dialogue acts, the state's changes and the results.

The first says what the user wants and what comes next; before a call it names the function and every argument. The
second says what the results hold and what to tell the user.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from coalm_nemo.data.sources.cra.dialogue import Act
from coalm_nemo.data.sources.cra.literal import literal
from coalm_nemo.data.sources.cra.observe import differences
from coalm_nemo.data.sources.cra.scene import Scene
from coalm_nemo.data.sources.cra.user_words import listed, sentence, user_sentence
from coalm_nemo.data.sources.cra.wording import (
    FLAGS,
    NO,
    PREPOSITIONS,
    REPORTS,
    YES,
    goal,
    is_name,
    noun,
    with_preposition,
)

_NAMES_GOAL = ("INFORM_INTENT", "AFFIRM_INTENT")
"""User acts whose words already say what is to be done."""


def thought_before(scene: Scene, rng: random.Random) -> str:
    """What the user wants, and which call or answer follows. No function is named where none is called."""
    plan = _plan_call(scene, rng) if scene.function else _plan_answer(scene, rng)
    return _one_line(" ".join([user_sentence(scene, rng), plan]))


def thought_after(scene: Scene, rng: random.Random) -> str:
    """What the results hold and what to say."""
    parts = [*_outcome(scene, rng), *_offered(scene, rng), *_answered(scene, rng), *_asked_more(scene, rng)]
    return _one_line(" ".join(sentence(part) for part in parts) or sentence(_found(scene, rng)))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _found(scene: Scene, rng: random.Random) -> str:
    """Where nothing says what the system does with the result (MultiWOZ)."""
    assert scene.function is not None
    total, words = len(scene.system.results), goal(scene.function)
    if total == 0:
        return f"the search found no {words.thing}, so I tell the user and ask what may be changed"
    many = f"{total} {words.things}" if total > 1 else f"one {words.thing}"
    return rng.choice(
        [f"the search found {many}, and I answer from that", f"{many} came back, so I can answer from these"]
    )


def named_call(scene: Scene) -> str:
    """`FindBus with departure city 'Fresno' and number of travelers 2`."""
    assert scene.function is not None
    values = []
    for slot, value in scene.arguments.items():
        flag = FLAGS.get(slot)
        if isinstance(value, bool):
            values.append(f"{flag.name if flag else noun(scene.service, slot)} set to {value}")
        else:
            values.append(f"{noun(scene.service, slot)} {literal(value) if isinstance(value, int) else _quoted(value)}")
    return f"{scene.function.name} with {listed(values)}" if values else f"{scene.function.name} without any argument"


def _quoted(value: str) -> str:
    return f"'{value}'"


def _plan_call(scene: Scene, rng: random.Random) -> str:
    assert scene.function is not None
    call, verb = named_call(scene), goal(scene.function).verb
    if scene.user_does("AFFIRM"):
        choices = [
            f"with that settled, I call {call}",
            f"nothing is left to settle, so I call {call}",
            f"that is the go-ahead, so I call {call}",
        ]
    elif scene.user_does("REQUEST_ALTS") or _searches_again(scene):
        choices = [f"this calls for a new search, so I call {call}", f"I search again and call {call}"]
    elif scene.user_does(*_NAMES_GOAL):
        choices = [
            f"I have all I need for this, so I call {call}",
            f"nothing is missing for this, so I call {call}",
            f"for this I call {call}",
        ]
    else:
        choices = [
            f"to {verb}, I call {call}",
            f"now I can {verb}: I call {call}",
            f"that is all I need to {verb}, so I call {call}",
        ]
    return " ".join([sentence(rng.choice(choices)), *_expected(scene, rng)])


def _searches_again(scene: Scene) -> bool:
    """The same search, after the system has offered something from it."""
    return not scene.user_does("INFORM_INTENT") and scene.followed("OFFER", "INFORM") and scene.user_does("INFORM")


def _expected(scene: Scene, rng: random.Random) -> Iterable[str]:
    """A question that came with the confirmation is answered from the result."""
    asked = [act for frame in scene.user for act in frame.acts if act.act == "REQUEST"]
    if asked and rng.random() < 0.5:
        yield rng.choice(
            [
                "The result should answer the question as well.",
                "Its result should also hold the answer to the question.",
            ]
        )


def _plan_answer(scene: Scene, rng: random.Random) -> str:
    """For the acts of an answer without a call. Acts that SGD does not annotate (MultiWOZ) leave one general sentence."""
    parts = [
        *_answered(scene, rng),
        *_another_offer(scene, rng),
        *_confirm(scene, rng),
        *_ask(scene, rng),
        *_propose(scene, rng),
        *_asked_more(scene, rng),
        *_goodbye(scene, rng),
    ]
    general = ["no search is needed for this, so I reply directly.", "I can reply to this without a search."]
    return " ".join(sentence(part) for part in parts or [rng.choice(general)])


def _item(scene: Scene, act: Act) -> str:
    """A slot and its value without a verb: `departure time 9:30 am`, `no subtitles`."""
    flag = FLAGS.get(act.slot)
    if flag and act.canonical and act.canonical[0] in YES | NO:
        return flag.wanted if act.canonical[0] in YES else flag.unwanted
    return f"{noun(scene.service, act.slot)} {listed(act.values)}"


def _fact(scene: Scene, act: Act) -> str:
    """A statement: `the fare is $25`, `it has live music`."""
    flag = FLAGS.get(act.slot)
    if flag and act.canonical and act.canonical[0] in YES | NO:
        return flag.true if act.canonical[0] in YES else flag.false
    return f"the {noun(scene.service, act.slot)} is {listed(act.values)}"


def _answered(scene: Scene, rng: random.Random) -> Iterable[str]:
    acts = [act for act in scene.system_acts("INFORM") if act.values]
    if not acts:
        return
    facts = listed([_fact(scene, act) for act in acts])
    if scene.function:
        choices = [
            f"I also tell the user that {facts}",
            f"the result answers the question too: {facts}",
            f"and {facts}",
        ]
        choices = choices[:2]
    else:
        choices = [
            f"the earlier result says that {facts}, so I tell the user",
            f"no call is needed for that, because I know from the earlier result that {facts}",
            f"I already have this from the earlier result: {facts}",
        ]
    yield rng.choice(choices)


def _another_offer(scene: Scene, rng: random.Random) -> Iterable[str]:
    acts = [act for act in scene.system_acts("OFFER") if act.values]
    if acts:
        what = _offer(scene, acts)
        yield rng.choice(
            [
                f"the earlier results also hold {what}, so I suggest that",
                f"from the results that I already have, I can suggest {what}",
                f"no new search is needed: I suggest {what} from the earlier results",
            ]
        )


def _offer(scene: Scene, acts: list[Act]) -> str:
    """What is offered: `Giants Vs Brewers at Oracle Park on March 5th (category Baseball)`, or "one with ..."."""
    names = [act for act in acts if is_name(act.slot)]
    if not names:
        return f"one with {listed([_item(scene, act) for act in acts])}"
    rest = [act for act in acts if act is not names[0]]
    phrases = [phrase for act in rest if (phrase := with_preposition(act.slot, listed(act.values)))]
    others = [_item(scene, act) for act in rest if act.slot not in PREPOSITIONS]
    return " ".join([listed(names[0].values), *phrases]) + (f" ({', '.join(others)})" if others else "")


def _confirm(scene: Scene, rng: random.Random) -> Iterable[str]:
    acts = [act for act in scene.system_acts("CONFIRM") if act.values]
    if acts:
        items = listed([_item(scene, act) for act in acts])
        verb = "go ahead" if scene.user_does(*_NAMES_GOAL) else goal(scene.intended).definite
        yield rng.choice(
            [
                f"before I {verb}, I check the details with the user: {items}",
                f"I have what I need to {verb}, but I ask the user to confirm first: {items}",
                f"to be sure, I have the user confirm this before I {verb}: {items}",
            ]
        )


def _ask(scene: Scene, rng: random.Random) -> Iterable[str]:
    acts, verb = scene.system_acts("REQUEST"), goal(scene.intended).verb
    if not acts:
        return
    wanted = [
        f"whether they want {FLAGS[act.slot].wanted}" if act.slot in FLAGS else f"the {noun(scene.service, act.slot)}"
        for act in acts
    ]
    wanted.sort(key=lambda item: item.startswith("whether"))
    examples = [value for act in acts for value in act.values]
    such_as = f", suggesting {listed(examples, 'or')}" if examples else ""
    what = listed(wanted)
    ask = f"I have to ask {'' if what.startswith('whether') else 'for '}{what}"
    known = scene.user_does(*_NAMES_GOAL)
    yield rng.choice(
        [
            f"{'for this' if known else f'to {verb},'} I still need to know {what}, so I ask{such_as}",
            f"before I can {'go ahead' if known else verb}, {ask}{such_as}",
            f"I do not know {what} yet, so I ask{such_as}",
        ]
    )


def _propose(scene: Scene, rng: random.Random) -> Iterable[str]:
    for act in scene.system_acts("OFFER_INTENT"):
        function = scene.schema.functions.get((scene.service, act.values[0])) if act.values else None
        verb = goal(function).definite
        yield rng.choice([f"as a next step I can offer to {verb}", f"I ask whether I should {verb}"])


def _asked_more(scene: Scene, rng: random.Random) -> Iterable[str]:
    if scene.system_acts("REQ_MORE"):
        yield rng.choice(["I ask whether there is anything else", "I offer my help with anything else"])


def _goodbye(scene: Scene, rng: random.Random) -> Iterable[str]:
    if scene.system_acts("GOODBYE"):
        yield rng.choice(["nothing is left to do, so I say goodbye", "I close the conversation with a friendly word"])


def _outcome(scene: Scene, rng: random.Random) -> Iterable[str]:
    assert scene.function is not None
    if scene.system_acts("NOTIFY_SUCCESS"):
        done = goal(scene.function).done or "the request went through"
        yield rng.choice([f"the call succeeded: {done}", f"it worked, {done}", f"the result shows that {done}"])
    elif scene.system_acts("NOTIFY_FAILURE"):
        yield from _failed(scene, rng)


def _failed(scene: Scene, rng: random.Random) -> Iterable[str]:
    results, other = scene.system.results, differences(scene.system.parameters or {}, scene.system.results)
    if other:
        parts = listed([f"{value} as a possible {noun(scene.service, slot)}" for slot, value in other.items()])
        yield f"the request as made did not go through, but the service came back with {parts}"
        if not scene.system_acts("OFFER"):
            yield "I tell the user that it failed"
    elif results:
        yield rng.choice(["the request did not go through, and I have to tell the user"])
    else:
        yield rng.choice(
            ["the result is empty, so I tell the user that it did not work out", "nothing came back: it failed"]
        )


def _offered(scene: Scene, rng: random.Random) -> Iterable[str]:
    acts = [act for act in scene.system_acts("OFFER") if act.values]
    if not acts:
        return
    assert scene.function is not None
    total, words = len(scene.system.results), goal(scene.function)
    if scene.system_acts("NOTIFY_FAILURE"):
        yield f"I propose {_offer(scene, acts)} instead"
    elif scene.function.name in REPORTS:
        facts = listed([_fact(scene, act) for act in acts])
        yield rng.choice([f"the result says that {facts}", f"I can tell the user that {facts}"])
    elif total == 1:
        yield rng.choice([f"the only {words.thing} found is {_offer(scene, acts)}, so I suggest it"])
    else:
        yield rng.choice([f"the search found {total} {words.things}", f"{total} {words.things} match"])
        first = "a good first suggestion is" if len(acts[0].values) == 1 else "good suggestions are"
        yield rng.choice([f"I suggest {_offer(scene, acts)}", f"{first} {_offer(scene, acts)}"])
