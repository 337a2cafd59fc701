"""Random schedules for the property tests."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from diagd.schedule import RowSeed, Schedule, StreamLayout, Table
from tests.oracles.simulator import Simulator


@dataclass(frozen=True)
class Case:
    """A schedule and the run of frames it is asked for."""

    schedule: Schedule
    first_frame: int
    frames: int
    fed: int

    def table(self, max_width: int | None = None) -> Table:
        return self.schedule.table(self.first_frame, self.frames, self.fed, max_width)

    def simulator(self) -> Simulator:
        s = self.schedule
        return Simulator(s.layout, s.k, s.d, s.row_seed, s.refeed, self.first_frame, self.frames, self.fed)


def layouts() -> st.SearchStrategy[StreamLayout]:
    return st.builds(
        StreamLayout,
        rows=st.integers(1, 5),
        columns=st.integers(1, 6),
        prefix=st.integers(0, 1),
        before=st.integers(0, 2),
        after=st.integers(0, 3),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layout = draw(layouts())
    k = draw(st.integers(1, layout.columns))
    lowest, highest = k * layout.rows, (layout.rows - 1) * k + layout.columns
    d = draw(st.one_of(st.sampled_from([lowest, highest]), st.integers(lowest, highest)))
    feeding = {"refeed": draw(st.booleans())}
    feeding["keep_seeds"] = not feeding["refeed"] and draw(st.booleans())
    schedule = Schedule(layout, k, d, draw(st.sampled_from(RowSeed)), **feeding)
    first_frame = draw(st.integers(1, 3))
    last_known = layout.prefix + first_frame * layout.frame_length + layout.before - 1
    fed = draw(st.one_of(st.just(0), st.just(last_known), st.integers(0, last_known)))
    return Case(schedule, first_frame, draw(st.integers(1, 4)), fed)
