"""One seat, who has it, and who waits."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from diagd.play.room import MAX_WAITING, Room
from diagd.play.stage import GameLoop
from diagd.play.table import Player, ServedTable, Update


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Place(ServedTable):
    def __init__(self) -> None:
        super().__init__((1, 1))
        self.engine = GameLoop([])

    @override
    def seat(self, player: Player, ticket: str, is_new: bool) -> None:
        super().seat(player, ticket, is_new)
        player.send({"seated": (ticket, is_new)})


class Somebody(Player):
    def __init__(self) -> None:
        self.told: list[Any] = []

    @override
    def send(self, message: dict[str, Any] | bytes) -> None:
        assert isinstance(message, dict)
        self.told.append(message.get("seated") or message["place"])

    @override
    def show(self, update: Update) -> None: ...

    @override
    def close(self, code: int, reason: str) -> None:
        self.told.append("out")


def test_the_seat_goes_on_in_turn_and_is_held_for_a_minute() -> None:
    clock = Clock()
    table = Place()
    room = Room([table], clock=clock)
    ann, ben, cid = Somebody(), Somebody(), Somebody()
    for guest in (ann, ben, cid):
        assert room.enter(guest, "")
    ((ticket, is_new),) = ann.told
    assert is_new
    assert (ben.told, cid.told) == ([1], [2])
    room.leave(ann)
    clock.now = 59
    room.turn()
    again = Somebody()
    assert room.enter(again, ticket)
    assert again.told == [(ticket, False)]
    room.leave(again)
    clock.now = 59 + 60
    room.turn()
    assert table.player is ben
    assert ben.told[-1][1] is True
    assert ben.told[-1][0] != ticket
    assert cid.told == [2, 1]
    late = Somebody()
    assert room.enter(late, ticket)
    assert late.told == [2]
    room.leave(cid)
    assert late.told == [2, 1]


def test_a_ticket_used_twice_puts_the_first_out() -> None:
    table = Place()
    room = Room([table], clock=Clock())
    ann, again = Somebody(), Somebody()
    room.enter(ann, "")
    room.enter(again, ann.told[0][0])
    assert ann.told[-1] == "out"
    assert table.player is again
    room.leave(ann)
    assert table.player is again


def test_the_queue_is_bounded() -> None:
    room = Room([Place()], clock=Clock())
    assert all(room.enter(Somebody(), "") for _ in range(MAX_WAITING + 1))
    assert not room.enter(Somebody(), "")


def test_a_place_in_the_queue_is_held_for_a_minute() -> None:
    clock = Clock()
    table = Place()
    room = Room([table], clock=clock)
    ann, ben, cid, dan = (Somebody() for _ in range(4))
    for guest in (ann, ben, cid, dan):
        room.enter(guest, "")
    ticket = room.waiting[0].ticket
    room.leave(ben)
    assert (cid.told, dan.told) == ([2, 1], [3, 2])
    clock.now = 59
    room.turn()
    again, other, late = Somebody(), Somebody(), Somebody()
    assert room.enter(again, ticket)
    assert (again.told, cid.told, dan.told) == ([1], [2, 1, 2], [3, 2, 3])
    assert room.enter(other, ticket)  # in another tab
    room.leave(again)
    assert (again.told, other.told) == ([1, "out"], [1])
    room.clear(table)
    room.turn()
    assert other.told == [1, (ticket, True)]
    ticket = room.waiting[0].ticket
    room.leave(cid)
    clock.now = 120
    room.turn()
    room.enter(late, ticket)
    assert late.told == [2]
    for _ in range(MAX_WAITING - 2):
        assert room.enter(Somebody(), "")
    assert not room.enter(Somebody(), "")
    room.leave(late)
    assert room.enter(Somebody(), "")  # places that are held keep nobody out
    assert not room.enter(Somebody(), "")


def test_who_stands_still_keeps_nobody_from_a_free_seat() -> None:
    clock = Clock()
    places = [Place(), Place(), Place()]
    for place in places[1:]:
        place.engine = places[0].engine
    engine = places[0].engine
    assert isinstance(engine, GameLoop)
    room = Room(places, 10.0, clock)
    ann, ben, cid = Somebody(), Somebody(), Somebody()
    room.enter(ann, "")
    room.enter(ben, "")
    clock.now = 1.9
    room.turn()
    assert ben.told == [1]
    clock.now = 2.0
    room.turn()
    assert places[1].player is ben
    engine._spent.extend([0.2] * 9)  # as those of a slow engine that began
    clock.now = 5.0
    room.enter(cid, "")
    assert cid.told == [1]
    room.leave(ben)
    assert engine.figures.measured == 0
