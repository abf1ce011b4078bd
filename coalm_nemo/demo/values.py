"""Where the demo's values come from: invented words without end, closed lists, numbers, and some real names.

Three disjoint sources keep the held-out sets honest. A fixed pool holds values that training sees often; fresh words
are drawn anew each time; real names come from a list. Whether a word is held out is a pure function of its letters
(`is_held_out`), so that no generator, whatever its seed, can leak one into training.
"""

from __future__ import annotations

import random
import zlib
from functools import cache
from typing import Literal

Split = Literal["train", "combinations", "words", "names"]
"""Training, and the held-out sets: new combinations of seen values, new invented words, new real names."""

Value = str | int


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ONSETS = _words(
    "b c d f g h j k l m n p r s t v w y z "  # singles twice: clusters should stay the rarer case
    "b c d f g h j k l m n p r s t v w z br ch cl cr dr fl fr gl gr kl kr pl pr qu sh sk sl sp st str th tr wh x"
)
VOWELS = _words("a e i o u a e i o u a e i o ai au ea ee ei ia ie io oa oo ou ue y")
CODAS = ("", "", "", "") + _words("b ck d g k l ll ld m n n nd ng nn nt p r r rd rg rn rt s s ss st t th tt ws x z ch")

CUISINES = ("Thai", "Greek", "Italian", "Indian", "Mexican", "Chinese", "French", "Turkish", "vegan", "seafood")
SPECIALTIES = ("skin", "heart", "eyes", "teeth", "back", "ears", "knees", "stomach")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "March", "April", "May", "June", "July", "August", "October")
SKIES = ("sun", "rain", "snow", "fog", "wind", "clouds")

FIRST_NAMES = _words(
    "Alice Amara Anders Beatrice Bianca Billie Carlos Carmen Chidi Clara Daniel David Dmitri Edith Elena Emeka "
    "Emma Farid Fatima Felix Fiona George Grace Hamza Hannah Harriet Henrik Hiro Ingrid Isabel Ivan Jamal James "
    "Joanna Jonas Joseph Julia Kateryna Keiko Kofi Laura Leila Leonard Liam Linda Lucas Lucia Magnus Maria Mateo "
    "Maya Mei Miriam Mohammed Nadia Naomi Nikolai Nina Noah Olivia Omar Oscar Patricia Paula Pedro Petra Priya "
    "Rafael Rania Rebecca Robert Rosa Ruth Samuel Sara Sergei Sofia Stefan Susan Tariq Thomas Tomas Ursula Vera "
    "Victor Walter William Yasmin Yuki Zainab Zoe"
)
SURNAMES = _words(
    "Abbott Adeyemi Ahmed Almeida Andersen Bailey Baker Banerjee Bauer Becker Bennett Bergman Brown Campbell "
    "Carter Castillo Chang Clarke Cohen Cooper Costa Davies Delgado Dubois Edwards Eriksson Evans Fischer Flores "
    "Fonseca Foster Fraser Fujita Garcia Gibson Gomez Gupta Hansen Harris Hernandez Holiday Hughes Ibrahim Ivanov "
    "Jackson Jensen Johansson Jones Kaplan Kaur Keller Kowalski Kumar Larsen Lehmann Lopez Marino Martin Mendoza "
    "Meyer Mitchell Moreau Morgan Murphy Nakamura Nguyen Novak Okafor Olsen Ortega Parker Patel Petrov Phillips "
    "Popescu Ramirez Richter Roberts Rossi Sanders Santos Schmidt Silva Singh Stewart Suzuki Tanaka Taylor Torres "
    "Turner Vargas Vogel Wagner Walker Watson Weber Williams Yamada Zimmerman"
)
CITIES = _words(
    "Aberdeen Accra Adelaide Amsterdam Ankara Antwerp Athens Atlanta Auckland Baltimore Bangkok Barcelona Basel "
    "Beirut Belgrade Bergen Berlin Bogota Bologna Bordeaux Boston Bremen Brisbane Bristol Brussels Budapest Cairo "
    "Calgary Cardiff Chennai Chicago Cologne Copenhagen Cordoba Dakar Dallas Delhi Denver Detroit Dublin Durban "
    "Edinburgh Florence Frankfurt Fresno Geneva Genoa Ghent Glasgow Granada Hamburg Hanoi Havana Helsinki Houston "
    "Istanbul Jakarta Karachi Kyoto Lagos Leeds Leipzig Lima Lisbon Liverpool London Lyon Madrid Malaga "
    "Manchester Manila Marseille Melbourne Miami Milan Montreal Mumbai Munich Nairobi Nantes Naples Nashville "
    "Odessa Orlando Osaka Oslo Ottawa Oxford Palermo Paris Perth Philadelphia Phoenix Porto Portland Prague Quito "
    "Reykjavik Riga Rotterdam Salzburg Santiago Seattle Seoul Seville Sheffield Sofia Stockholm Sydney Tampa "
    "Tokyo Toronto Toulouse Tunis Turin Utrecht Valencia Vancouver Venice Verona Vienna Warsaw Wellington Zagreb "
    "Zurich"
)


def is_held_out(text: str) -> bool:
    """One text in eight, by its letters alone: such a text never occurs in training rows."""
    return zlib.crc32(text.encode()) % 8 == 0


@cache
def real_names(held_out: bool) -> dict[str, tuple[str, ...]]:
    """The real names of one side, by kind: "first", "last", "city"."""
    kinds = {"first": FIRST_NAMES, "last": SURNAMES, "city": CITIES}
    return {kind: tuple(n for n in names if is_held_out(n) == held_out) for kind, names in kinds.items()}


def invent_word(rng: random.Random, held_out: bool = False) -> str:
    """A pronounceable capitalised word of 4 to 10 letters that is in no list; held out or not, as asked."""
    while True:
        syllables = rng.choice((2, 2, 2, 3))
        parts = [
            rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if rng.random() < 0.5 else "")
            for _ in range(syllables)
        ]
        word = "".join(parts).capitalize()
        if 4 <= len(word) <= 10 and is_held_out(word) == held_out and word not in _listed_words():
            return word


@cache
def _listed_words() -> frozenset[str]:
    closed = CUISINES + SPECIALTIES + DAYS + MONTHS + SKIES
    return frozenset((*(w.capitalize() for w in closed), *FIRST_NAMES, *SURNAMES, *CITIES))


@cache
def _pool() -> dict[str, tuple[str, ...]]:
    """Values that training meets again and again, so that a combination of them can be new while each is known."""
    rng = random.Random("the demo's pool of known values")
    words = [invent_word(rng) for _ in range(480)]
    people = tuple(f"{a} {b}" for a, b in zip(words[300:390], words[390:480], strict=True))
    return {"place": tuple(words[:150]), "venue": tuple(words[150:300]), "person": people}


class ValueSource:
    """Draws values of every kind for one split, all from the given random generator."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.split = split

    def draw(self, kind: str) -> Value:
        """A value of a slot kind: place, venue, person, code, time, day, date, small, money, phone or a closed list."""
        if kind in ("place", "venue", "person"):
            return self._open(kind)
        return self._closed(kind)

    def _open(self, kind: str) -> str:
        source = self._source()
        if source == "pool":
            return self.rng.choice(_pool()[kind])
        if source == "real":
            return self._real_name(kind)
        words = 2 if kind == "person" or (kind == "venue" and self.rng.random() < 0.2) else 1
        return " ".join(invent_word(self.rng, held_out=self.split == "words") for _ in range(words))

    def _source(self) -> str:
        if self.split == "train":
            return self.rng.choices(("pool", "fresh", "real"), (0.35, 0.55, 0.10))[0]
        return {"combinations": "pool", "words": "fresh", "names": "real"}[self.split]

    def _real_name(self, kind: str) -> str:
        names = real_names(held_out=self.split == "names")
        if kind == "person":
            return f"{self.rng.choice(names['first'])} {self.rng.choice(names['last'])}"
        return self.rng.choice(names["city" if kind == "place" else "last"])

    def _closed(self, kind: str) -> Value:
        rng = self.rng
        lists = {"cuisine": CUISINES, "specialty": SPECIALTIES, "day": DAYS, "sky": SKIES}
        if kind in lists:
            return rng.choice(lists[kind])
        if kind == "time":
            return f"{rng.randint(7, 22):02d}:{rng.choice((0, 15, 30, 45)):02d}"
        if kind == "date":
            return f"{rng.choice(MONTHS)} {rng.randint(1, 30)}"
        if kind == "code":
            return "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(2)) + str(rng.randint(100, 999))
        low, high = {"small": (2, 9), "stars": (2, 5), "money": (10, 99), "phone": (1000, 9999)}[kind]
        return rng.randint(low, high)
