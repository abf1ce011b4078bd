"""Words of our own for the intents and slots of Schema-Guided Dialogue; others fall back on the schema's own names."""

from __future__ import annotations

from dataclasses import dataclass

from coalm_nemo.data.sources.cra.schema import Function


@dataclass(frozen=True)
class Goal:
    """How one speaks of an intent."""

    verb: str
    """After "to": what the user wants done."""
    thing: str = "result"
    """What one record of the result is."""
    done: str = ""
    """A sentence without its stop: what is true once the call succeeded."""

    @property
    def definite(self) -> str:
        """The same where one thing has been singled out; only playing is said differently then."""
        return self.verb.replace("play a ", "play the ")

    @property
    def things(self) -> str:
        irregular = {"bus": "buses", "balance": "balances", "place to stay": "places to stay"}
        return irregular.get(self.thing, self.thing + "s")


@dataclass(frozen=True)
class Flag:
    """A boolean slot in words: wanted or not, being so or not, and its bare name."""

    wanted: str
    unwanted: str
    true: str
    false: str
    name: str


_EVENT = Goal("find an event", "event")
_EVENT_TICKETS = Goal("buy event tickets", "ticket", "the tickets are bought")
_BUS = Goal("find a bus", "bus")
_BUS_TICKET = Goal("buy bus tickets", "ticket", "the bus tickets are bought")
_CAR = Goal("find a rental car", "rental car")
_CAR_RESERVED = Goal("reserve a rental car", "reservation", "the car is reserved")
_SONG = Goal("find a song", "song")
_PLAY_SONG = Goal("play a song", "song", "the song is playing")
_HOTEL = Goal("find a hotel", "hotel")
_ROOM = Goal("reserve a hotel room", "reservation", "the hotel room is reserved")
_RIDE = Goal("book a ride", "ride", "the ride is booked")
_ONE_WAY, _ROUND_TRIP = Goal("find a one-way flight", "flight"), Goal("find a round-trip flight", "flight")

GOALS: dict[tuple[str, str], Goal] = {
    ("Banks_1", "CheckBalance"): Goal("check an account balance", "balance"),
    ("Banks_1", "TransferMoney"): Goal("transfer money", "transfer", "the money is transferred"),
    ("Buses_1", "FindBus"): _BUS,
    ("Buses_1", "BuyBusTicket"): _BUS_TICKET,
    ("Buses_2", "FindBus"): _BUS,
    ("Buses_2", "BuyBusTicket"): _BUS_TICKET,
    ("Calendar_1", "GetEvents"): Goal("see what is in the calendar", "event"),
    ("Calendar_1", "GetAvailableTime"): Goal("check when the calendar is free", "free time"),
    ("Calendar_1", "AddEvent"): Goal("add an event to the calendar", "event", "the event is in the calendar"),
    ("Events_1", "FindEvents"): _EVENT,
    ("Events_1", "BuyEventTickets"): _EVENT_TICKETS,
    ("Events_2", "FindEvents"): _EVENT,
    ("Events_2", "GetEventDates"): Goal("find out when an event takes place", "date"),
    ("Events_2", "BuyEventTickets"): _EVENT_TICKETS,
    ("Flights_1", "SearchOnewayFlight"): _ONE_WAY,
    ("Flights_1", "SearchRoundtripFlights"): _ROUND_TRIP,
    ("Flights_1", "ReserveOnewayFlight"): Goal("reserve a one-way flight", "reservation", "the flight is reserved"),
    ("Flights_1", "ReserveRoundtripFlights"): Goal(
        "reserve a round-trip flight", "reservation", "the round-trip flight is reserved"
    ),
    ("Flights_2", "SearchOnewayFlight"): _ONE_WAY,
    ("Flights_2", "SearchRoundtripFlights"): _ROUND_TRIP,
    ("Homes_1", "FindApartment"): Goal("find an apartment", "apartment"),
    ("Homes_1", "ScheduleVisit"): Goal("schedule a visit to an apartment", "visit", "the visit is scheduled"),
    ("Hotels_1", "SearchHotel"): _HOTEL,
    ("Hotels_1", "ReserveHotel"): _ROOM,
    ("Hotels_2", "SearchHouse"): Goal("find a house for a short stay", "house"),
    ("Hotels_2", "BookHouse"): Goal("book a house", "booking", "the house is booked"),
    ("Hotels_3", "SearchHotel"): _HOTEL,
    ("Hotels_3", "ReserveHotel"): _ROOM,
    ("Media_1", "FindMovies"): Goal("find a movie to watch", "movie"),
    ("Media_1", "PlayMovie"): Goal("play a movie", "movie", "the movie is playing"),
    ("Movies_1", "BuyMovieTickets"): Goal("buy movie tickets", "ticket", "the movie tickets are bought"),
    ("Movies_1", "FindMovies"): Goal("find a movie in a theater", "movie"),
    ("Movies_1", "GetTimesForMovie"): Goal("look up the show times of a movie", "showing"),
    ("Music_1", "LookupSong"): _SONG,
    ("Music_1", "PlaySong"): _PLAY_SONG,
    ("Music_2", "LookupMusic"): _SONG,
    ("Music_2", "PlayMedia"): _PLAY_SONG,
    ("RentalCars_1", "GetCarsAvailable"): _CAR,
    ("RentalCars_1", "ReserveCar"): _CAR_RESERVED,
    ("RentalCars_2", "GetCarsAvailable"): _CAR,
    ("RentalCars_2", "ReserveCar"): _CAR_RESERVED,
    ("Restaurants_1", "FindRestaurants"): Goal("find a restaurant", "restaurant"),
    ("Restaurants_1", "ReserveRestaurant"): Goal("reserve a table", "reservation", "the table is reserved"),
    ("RideSharing_1", "GetRide"): _RIDE,
    ("RideSharing_2", "GetRide"): _RIDE,
    ("Services_1", "FindProvider"): Goal("find a hair stylist", "hair stylist"),
    ("Services_1", "BookAppointment"): Goal(
        "book an appointment with a hair stylist", "appointment", "the appointment is booked"
    ),
    ("Services_2", "FindProvider"): Goal("find a dentist", "dentist"),
    ("Services_2", "BookAppointment"): Goal(
        "book an appointment with a dentist", "appointment", "the appointment is booked"
    ),
    ("Services_3", "FindProvider"): Goal("find a doctor", "doctor"),
    ("Services_3", "BookAppointment"): Goal(
        "book an appointment with a doctor", "appointment", "the appointment is booked"
    ),
    ("Travel_1", "FindAttractions"): Goal("find an attraction to visit", "attraction"),
    ("Weather_1", "GetWeather"): Goal("check the weather", "forecast"),
    ("hotel", "find_hotel"): Goal("find a place to stay", "place to stay"),
    ("restaurant", "find_restaurant"): Goal("find a restaurant", "restaurant"),
    ("attraction", "find_attraction"): Goal("find an attraction to visit", "attraction"),
    ("train", "find_train"): Goal("find a train", "train"),
}

REPORTS = frozenset({"CheckBalance", "GetAvailableTime", "GetEventDates", "GetEvents", "GetWeather"})
"""Functions that answer a question rather than find something to choose from."""

FLAGS: dict[str, Flag] = {
    "internet": Flag("internet", "no internet", "it has internet", "it has no internet", "internet"),
    "parking": Flag("parking", "no parking", "it has parking", "it has no parking", "parking"),
    "refundable": Flag(
        "a refundable booking",
        "a booking that need not be refundable",
        "it is refundable",
        "it is not refundable",
        "refundable",
    ),
    "is_redeye": Flag("a red-eye flight", "no red-eye flight", "it is a red-eye", "it is not a red-eye", "red-eye"),
    "furnished": Flag(
        "a furnished place", "an unfurnished place", "it is furnished", "it is not furnished", "furnished"
    ),
    "pets_allowed": Flag(
        "pets to be allowed", "a place without pets", "pets are allowed", "pets are not allowed", "pets allowed"
    ),
    "pets_welcome": Flag(
        "a place that welcomes pets", "a place without pets", "pets are welcome", "pets are not welcome", "pets welcome"
    ),
    "has_wifi": Flag("Wi-Fi", "no Wi-Fi", "it has Wi-Fi", "it has no Wi-Fi", "Wi-Fi"),
    "has_laundry_service": Flag(
        "a laundry service",
        "no laundry service",
        "it has a laundry service",
        "it has no laundry service",
        "laundry service",
    ),
    "subtitles": Flag("subtitles", "no subtitles", "it has subtitles", "it has no subtitles", "subtitles"),
    "serves_alcohol": Flag(
        "a place that serves alcohol",
        "a place without alcohol",
        "it serves alcohol",
        "it does not serve alcohol",
        "alcohol",
    ),
    "has_live_music": Flag("live music", "no live music", "it has live music", "it has no live music", "live music"),
    "shared_ride": Flag(
        "a shared ride", "a ride that is not shared", "the ride is shared", "the ride is not shared", "shared ride"
    ),
    "is_unisex": Flag("a unisex salon", "a salon that is not unisex", "it is unisex", "it is not unisex", "unisex"),
    "offers_cosmetic_services": Flag(
        "cosmetic services",
        "no cosmetic services",
        "it offers cosmetic services",
        "it does not offer cosmetic services",
        "cosmetic services",
    ),
    "free_entry": Flag(
        "free entry", "an attraction with an entry fee", "entry is free", "entry is not free", "free entry"
    ),
    "good_for_kids": Flag(
        "a place that is good for kids",
        "a place that need not suit kids",
        "it is good for kids",
        "it is not good for kids",
        "good for kids",
    ),
}

NOUNS: dict[str, str] = {
    "address_of_location": "address",
    "approximate_ride_duration": "duration of the ride",
    "area": "area",
    "arriveby": "arrival time",
    "artist": "artist",
    "available_end_time": "end of the free time",
    "available_start_time": "start of the free time",
    "city_of_event": "city",
    "departure_date": "departure date",
    "directed_by": "director",
    "dropoff_date": "drop-off date",
    "event_location": "event location",
    "from_location": "departure city",
    "from_station": "departure station",
    "group_size": "number of travelers",
    "leaveat": "departure time",
    "number_of_baths": "number of bathrooms",
    "number_of_beds": "number of bedrooms",
    "number_stops": "number of stops",
    "pickup_city": "pick-up city",
    "pickup_date": "pick-up date",
    "pickup_location": "pick-up location",
    "pickup_time": "pick-up time",
    "pricerange": "price range",
    "recipient_account_name": "name of the recipient",
    "recipient_account_type": "account type of the recipient",
    "ride_fare": "fare",
    "song_name": "song",
    "title": "title",
    "to_location": "destination city",
    "to_station": "arrival station",
    "transfers": "number of transfers",
    "travelers": "number of travelers",
    "where_to": "destination",
    "wind": "wind speed",
}

SERVICE_NOUNS: dict[tuple[str, str], str] = {
    ("RentalCars_1", "type"): "car type",
    ("Services_3", "type"): "speciality",
    ("Hotels_2", "number_of_adults"): "number of adults",
    ("Homes_1", "area"): "city",
    ("Homes_1", "property_name"): "apartment",
}
"""Where the same slot name means another thing in one service."""

PREPOSITIONS: dict[str, str] = {
    "appointment_date": "on",
    "appointment_time": "at",
    "city": "in",
    "date": "on",
    "event_location": "at",
    "leaving_time": "at",
    "location": "in",
    "pickup_date": "on",
    "pickup_location": "at",
    "time": "at",
    "venue": "at",
}
"""Slots that follow a name with a preposition: Bazille in Palo Alto, Giants Vs Brewers at Oracle Park on March 5th."""

YES, NO = frozenset({"True", "yes", "free"}), frozenset({"False", "no"})
"""Values of flags: SGD's are True and False, MultiWOZ's yes, free and no."""

_NAMES = ("title", "name", "trainID")


def goal(function: Function | None) -> Goal:
    """The words for an intent; for one without any, its description in the schema."""
    if function is None:
        return Goal("get help", "result")
    if (function.service, function.name) in GOALS:
        return GOALS[function.service, function.name]
    verb = function.description.strip().rstrip(".")
    return Goal(verb[:1].lower() + verb[1:] or "get help", "result", "the request went through")


def noun(service: str, slot: str) -> str:
    """A slot's name as one says it, without an article."""
    return SERVICE_NOUNS.get((service, slot)) or NOUNS.get(slot) or slot.replace("_", " ")


def with_preposition(slot: str, value: str) -> str:
    """`on March 5th`, but `next Friday`: relative days take none. Empty for slots that are not said so."""
    preposition = PREPOSITIONS.get(slot, "")
    if preposition == "on" and not any(character.isdigit() for character in value):
        return value
    return f"{preposition} {value}" if preposition else ""


def is_name(slot: str) -> bool:
    """Whether the slot names what is offered (a restaurant, a movie) rather than describing it."""
    return slot in _NAMES or (slot.endswith("_name") and "station" not in slot and "account" not in slot)
