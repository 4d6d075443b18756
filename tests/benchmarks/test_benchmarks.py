"""The benchmarks of builds run on very few rows."""

import pytest

from benchmarks.build_memory import peak_memory
from benchmarks.self_powered import measure


def test_building_is_measured_against_a_plain_loop():
    found = measure("assets/nano/llm", rows=12, turns=2, cores=1, processes=1)
    assert (found["rows"], len(found["ratios"])) == (12, 2)
    assert found["ratio"] > 0


def test_a_build_that_fails_is_no_measurement():
    with pytest.raises(ChildProcessError, match="(?s)the build ended with 1: .*OSError"):
        peak_memory("no-such-llm", rows=7, threads=1)
