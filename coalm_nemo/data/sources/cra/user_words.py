"""The user's side of a thought: what the user's acts and the change of state amount to, as clauses after "the user"."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from coalm_nemo.data.sources.cra.dialogue import Act, Frame
from coalm_nemo.data.sources.cra.scene import Scene
from coalm_nemo.data.sources.cra.schema import DONTCARE
from coalm_nemo.data.sources.cra.wording import FLAGS, NO, YES, goal, noun


def listed(items: Sequence[str], last: str = "and") -> str:
    """a; a and b; a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def sentence(text: str) -> str:
    """With a capital and exactly one stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


def shown(surface: str, value: str) -> str:
    """The words used, and the canonical value where it is another: `today (2019-03-01)`."""
    return surface if surface.casefold() == value.casefold() else f"{surface} ({value})"


def user_sentence(scene: Scene, rng: random.Random) -> str:
    """ "The user confirms the details and asks for the address." Empty where the acts say nothing."""
    clauses = [clause for builder in _BUILDERS for clause in builder(scene, rng)]
    if not clauses:
        return ""
    return sentence(f"the user {listed(clauses)}") + _carried_over(scene)


def _acts(scene: Scene, name: str) -> list[tuple[Frame, Act]]:
    return [(frame, act) for frame in scene.user for act in frame.acts if act.act == name]


def _negated(scene: Scene, rng: random.Random) -> Iterable[str]:
    if _acts(scene, "NEGATE_INTENT"):
        offered = [act.values[0] for act in scene.before.last_acts if act.act == "OFFER_INTENT" and act.values]
        function = next((f for f in scene.schema.functions.values() if [f.name] == offered[:1]), None)
        if function is None:
            yield "declines the offer"
        else:
            verb = goal(function).verb
            yield rng.choice(
                [f"does not want me to {verb}", f"declines the offer to {verb}", f"would rather not {verb} now"]
            )
    if not _acts(scene, "NEGATE"):
        return
    if scene.followed("REQ_MORE"):
        yield rng.choice(["needs nothing else", "has no further request", "says that this is all"])
    elif scene.followed("OFFER"):
        yield rng.choice(["declines the alternative", "does not want the alternative", "turns the alternative down"])
    elif not _acts(scene, "INFORM"):
        yield "says that the details are not right"


def _affirmed(scene: Scene, rng: random.Random) -> Iterable[str]:
    if _acts(scene, "AFFIRM"):
        if scene.followed("CONFIRM"):
            yield rng.choice(["confirms the details", "agrees to the details", "says that the details are right"])
        else:
            yield (
                rng.choice(["accepts the alternative", "agrees to the alternative"])
                if scene.followed("OFFER")
                else "agrees"
            )
    if _acts(scene, "AFFIRM_INTENT"):
        verb = goal(scene.intended).definite
        yield rng.choice([f"wants me to {verb}", f"accepts the offer to {verb}", f"agrees that I {verb}"])


def _selected(scene: Scene, rng: random.Random) -> Iterable[str]:
    for frame, act in _acts(scene, "SELECT")[:1]:
        entity = act.canonical[0] if act.canonical else scene.before.entity.get(frame.service, "")
        if entity:
            yield rng.choice(
                [f"chooses {entity}", f"likes {entity}", f"is happy with {entity}", f"decides on {entity}"]
            )
        else:
            yield rng.choice(["is happy with the answer", "is satisfied with that"])


def _thanked(scene: Scene, rng: random.Random) -> Iterable[str]:
    if _acts(scene, "THANK_YOU"):
        yield rng.choice(["thanks me", "says thank you"])


def _intended(scene: Scene, rng: random.Random) -> Iterable[str]:
    for frame, act in _acts(scene, "INFORM_INTENT")[:1]:
        function = scene.schema.functions.get((frame.service, act.values[0])) if act.values else None
        verb = goal(function).verb
        yield rng.choice([f"wants to {verb}", f"would like to {verb}", f"asks me to {verb}", f"wants me to {verb}"])


def _informed(scene: Scene, rng: random.Random) -> Iterable[str]:
    given, changed, wanted = [], [], []
    form = rng.randrange(2)
    for frame, act in _acts(scene, "INFORM"):
        if not act.values or not act.slot:
            continue
        name, flag, value = noun(frame.service, act.slot), FLAGS.get(act.slot), act.canonical[0]
        text, earlier = shown(act.values[0], value), _earlier(scene, frame, act)
        if value == DONTCARE:
            wanted.append(f"has no preference for the {flag.name if flag else name}")
        elif flag and value in YES | NO:
            wanted.append(f"wants {flag.wanted if value in YES else flag.unwanted}")
        elif earlier:
            changed.append(f"the {name} from {earlier} to {text}")
        else:
            given.append(f"{text} as the {name}" if form else f"the {name} ({_inner(act.values[0], value)})")
    if given:
        yield f"{rng.choice(['gives', 'specifies', 'provides', 'mentions'])} {listed(given)}"
    if changed:
        yield f"{'corrects' if _acts(scene, 'NEGATE') else 'changes'} {listed(changed)}"
    yield from wanted


def _inner(surface: str, value: str) -> str:
    """Within brackets: `today, that is 2019-03-01`."""
    return surface if surface.casefold() == value.casefold() else f"{surface}, that is {value}"


def _earlier(scene: Scene, frame: Frame, act: Act) -> str:
    """The value that this one replaces, in the words used then; empty where the slot is new or the value the same."""
    settled = act.slot in scene.before.states.get(frame.service, {})
    confirmed = any(last.act == "CONFIRM" and last.slot == act.slot for last in scene.before.last_acts)
    said = scene.before.said.get(frame.service, {}).get(act.slot)
    changed = (settled or confirmed) and said not in (None, act.canonical[0], DONTCARE)
    return scene.before.shown[frame.service][act.slot] if changed else ""


def _alternatives(scene: Scene, rng: random.Random) -> Iterable[str]:
    if _acts(scene, "REQUEST_ALTS"):
        yield rng.choice(["asks for another option", "would like to hear of something else", "wants an alternative"])


def _requested(scene: Scene, rng: random.Random) -> Iterable[str]:
    nouns, questions = [], []
    for frame, act in _acts(scene, "REQUEST"):
        flag, name = FLAGS.get(act.slot), noun(frame.service, act.slot)
        if flag:
            questions.append(f"whether {flag.true}")
        elif act.values:
            questions.append(f"whether the {name} is {act.canonical[0]}")
        else:
            nouns.append(f"the {name}")
    if nouns and questions:
        yield f"{rng.choice(['wants to know', 'would like to know'])} {listed([*nouns, *questions])}"
    elif nouns:
        yield f"{rng.choice(['asks for', 'wants to know', 'would like to know'])} {listed(nouns)}"
    elif questions:
        yield f"{rng.choice(['asks', 'wants to know'])} {listed(questions)}"


def _finished(scene: Scene, rng: random.Random) -> Iterable[str]:
    if _acts(scene, "GOODBYE"):
        yield rng.choice(["needs nothing else", "is done for now", "ends the conversation"])


def _carried_over(scene: Scene) -> str:
    """Values that a new intent takes from earlier: in the state now, not before, and in no act of this turn."""
    for frame in scene.user if _acts(scene, "INFORM_INTENT") else ():
        named = {act.slot for act in frame.acts}
        before = scene.before.states.get(frame.service, {})
        skipped = named | set(before) | set(FLAGS)
        new = [slot for slot, values in (frame.state or {}).items() if values and slot not in skipped]
        values = [f"the {noun(frame.service, slot)} ({(frame.state or {})[slot][0]})" for slot in new]
        if values and not any(act.act == "SELECT" for act in frame.acts):
            return " " + sentence(f"{listed(values)} {'carries' if len(values) == 1 else 'carry'} over from before")
    return ""


_BUILDERS = (
    _negated,
    _affirmed,
    _selected,
    _thanked,
    _intended,
    _informed,
    _alternatives,
    _requested,
    _finished,
)
