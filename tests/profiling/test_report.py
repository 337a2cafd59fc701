"""Reports: schema, statistics, and what is no report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from diagd.errors import UsageError
from diagd.profiling.profile import Profile
from diagd.profiling.report import Report, describe, read_report

times = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=60)


@given(times)
def test_percentiles_are_numpys(values: list[float]) -> None:
    found = describe(values)
    expected = np.percentile(values, [50, 90, 99])
    np.testing.assert_allclose([found.p50, found.p90, found.p99], expected)
    assert found.count == len(values)
    assert found.max == max(values)
    assert found.total == pytest.approx(sum(values))
    assert found.mean * found.count == pytest.approx(found.total)


def test_jitter_is_the_mean_change() -> None:
    assert describe([1.0, 3.0, 2.0]).jitter == 1.5
    assert describe([5.0]).jitter == 0.0
    assert describe([]).count == 0


def test_a_report_reads_back_and_holds_its_schema(profiled: Profile, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    profiled.report.write(file)
    assert read_report(file) == profiled.report
    content = json.loads(file.read_text())
    schema = Report.model_json_schema()
    assert set(content) == set(schema["properties"])
    for field in list(content):
        broken = {name: value for name, value in content.items() if name != field}
        if field in schema["required"]:
            with pytest.raises(ValidationError):
                Report.model_validate(broken)
    with pytest.raises(ValidationError):
        Report.model_validate(content | {"extra": 1})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 3}'])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UsageError):
        read_report(tmp_path / "r.json")
    with pytest.raises(UsageError):
        read_report(tmp_path / "absent.json")


def test_a_report_of_version_1_is_read(profiled: Profile, tmp_path: Path) -> None:
    """It had estimates and optimisations as well, and called the model its subject."""
    file = tmp_path / "report.json"
    profiled.report.write(file)
    content = json.loads(file.read_text())
    subject = {"model" if name == "name" else name: value for name, value in content.pop("model").items()}
    content |= {"schema_version": 1, "subject": subject, "ladder": [], "estimate": 1.0, "cuts": []}
    file.write_text(json.dumps(content))
    assert read_report(file) == profiled.report
