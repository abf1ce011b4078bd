"""How users and the assistant of the demo's world put things: templates only, no logic."""

from __future__ import annotations

OPENINGS: dict[str, tuple[str, ...]] = {
    "tables": ("I want a table", "Find me a restaurant", "We would like to eat out", "Find a table"),
    "trains": ("I need a train", "Find me a train", "I want to go by train", "Is there a train"),
    "hotels": ("I need a hotel", "Find me a room", "I want a hotel room", "We are looking for a hotel"),
    "doctors": ("I need a doctor", "Find me a doctor", "I want to see a doctor", "Is there a doctor"),
    "weather": ("How is the weather", "Tell me the weather", "I need a forecast", "Will the weather be good"),
}

FRAGMENTS: dict[str, tuple[str, ...]] = {
    "city": ("in {v}", "around {v}"),
    "cuisine": ("with {v} food", "serving {v} food"),
    "origin": ("from {v}", "leaving {v}"),
    "destination": ("to {v}", "going to {v}"),
    "day": ("on {v}", "for {v}"),
    "stars": ("with {v} stars", "of {v} stars"),
    "specialty": ("for my {v}", "who treats the {v}"),
    "time": ("at {v}", "around {v}"),
    "people": ("for {v} people", "for a party of {v}"),
    "tickets": ("with {v} tickets", "and I need {v} tickets"),
    "date": ("from {v}", "starting {v}"),
    "nights": ("for {v} nights", "staying {v} nights"),
}

BOOKINGS: dict[str, tuple[str, ...]] = {
    "tables": ("Book it", "Reserve a table there", "Good, book that one"),
    "trains": ("Buy it", "I take that train", "Good, book that one"),
    "hotels": ("Book it", "Reserve a room there", "Good, book that one"),
    "doctors": ("Book a visit", "I take that doctor", "Good, book that one"),
}

ANSWERS = ("{f}.", "{f} please.", "{v}.", "{v} please.", "Let us say {v}.")
"""A reply to the question for one slot: `f` is the slot's fragment, `v` the bare value."""

CHANGES = (
    "Change the {s} to {v}.",
    "Sorry, the {s} should be {v}.",
    "Make the {s} {v} instead.",
    "On second thought, the {s} is {v}.",
)

ASKS = ("Which {s}?", "What {s} would you like?", "Tell me the {s}.")
ASK_THOUGHT = "I still need the {s}."
NEUTRAL_THOUGHT = "Let me see what to do next."
"""Says nothing of the next step, so that whether to call, to ask or to refuse is the model's own decision."""
SEARCH_THOUGHT = "I know enough to search."
BOOK_THOUGHT = "I have all I need to book."
FOUND_THOUGHT = "I report it."
DETAIL_THOUGHT = "The result says it."

FOUND: dict[str, tuple[str, ...]] = {
    "tables": ("I found {name}. Shall I book?", "{name} has a table. Shall I book?"),
    "trains": ("Train {train} leaves at {leaves}.", "There is {train} at {leaves}."),
    "hotels": ("{name} has rooms for {price} a night.", "I found {name} for {price} a night."),
    "doctors": ("You could see {doctor}.", "I found {doctor}. Shall I book?"),
    "weather": ("Expect {sky} and {degrees} degrees.", "It will be {degrees} degrees with {sky}."),
}
NOTHING_FOUND = ("I found nothing. Change something?", "Nothing fits. What else?")

DETAIL_QUESTIONS: dict[str, tuple[str, ...]] = {
    "price": ("What does it cost?", "How much is it?"),
    "phone": ("What is the phone number?", "Give me the phone number."),
    "leaves": ("When does it leave?",),
    "floor": ("On which floor?", "Which floor is it?"),
    "sky": ("Sun or rain?",),
    "degrees": ("How warm is it?", "How many degrees?"),
}
DETAIL_ANSWERS: dict[str, str] = {
    "price": "It costs {v}.",
    "phone": "The phone number is {v}.",
    "leaves": "It leaves at {v}.",
    "floor": "It is on floor {v}.",
    "sky": "Expect {v}.",
    "degrees": "It will be {v} degrees.",
}

BOOKED = ("Done, your reference is {reference}.", "It is booked under {reference}.")
NOT_BOOKED = "I could not book that."

CHORE_VERBS = ("mow", "paint", "sell", "wash", "fix", "draw", "translate", "carry", "clean", "print", "count", "lift")
CHORE_OBJECTS = (
    "lawn",
    "fence",
    "car",
    "letter",
    "piano",
    "roof",
    "bike",
    "poem",
    "sofa",
    "garden",
    "window",
    "shoes",
    "contract",
    "laptop",
    "door",
    "cake",
)
CHORE_REQUESTS = ("Please {c}.", "Can you {c}?", "I want you to {c}.", "Could you {c} for me?")
REFUSALS = ("Sorry, I have no tool to {c}.",)
THANKS = ("Thanks, bye.", "Thank you, that is all.", "Great, thanks.")
FAREWELLS = ("You are welcome.", "Glad to help.")
