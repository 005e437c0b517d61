"""The time that a job is said to take yet, against jobs whose every second is known."""

import dataclasses
import itertools

import pytest
from rich.console import Console

from daq_jax.io.jobs import progress
from daq_jax.io.jobs.pace import Pace
from daq_jax.io.jobs.progress import Expected, progress_on


@dataclasses.dataclass
class Step:
    """A step of a job: what it is told to do, and how long it takes."""

    nbytes: int
    programs: int
    seconds: float


def layers(number, *, compiling, first=()):
    """A job of some layers. Each has a large and a small weight, and each weight a norm that is copied."""
    steps = list(first)
    for layer in range(number):
        for nbytes, seconds in ((4000, 4.0), (1000, 1.0)):
            fresh = layer == 0
            steps += [Step(nbytes, int(fresh), seconds + compiling * fresh), Step(0, 0, 0.01)]
    return steps


JOBS = {
    "two shapes, compiled at once": layers(12, compiling=20.0),
    "a large tensor is copied first": [Step(0, 0, 3.0), *layers(12, compiling=20.0)],
    "nothing is compiled": layers(12, compiling=0.0)[4:],
    "a third shape comes last": [*layers(12, compiling=20.0), Step(2000, 1, 22.0)],
    "each layer has a shape of its own": [
        Step(1000, int(i % 4 == 0), 21.0 if i % 4 == 0 else 1.0) for i in range(48)
    ],
}


def estimates(steps):
    """(estimate, truth) at the beginning and in the middle of each step."""
    now = 0.0
    pace = Pace(sum(s.nbytes for s in steps), sum(s.programs for s in steps), clock=lambda: now)
    found = []
    for i, step in enumerate(steps):
        pace.begin(step.nbytes, step.programs)
        for share in (0.0, 0.5):
            left = step.seconds * (1 - share) + sum(s.seconds for s in steps[i + 1 :])
            now += share * step.seconds
            found.append((pace.seconds_left, left))
        now += 0.5 * step.seconds
    return found


@pytest.mark.parametrize("job", JOBS)
def test_an_estimate_is_near_the_truth_from_the_first_on(job):
    found = [(said, left) for said, left in estimates(JOBS[job]) if said is not None]
    assert len(found) > len(JOBS[job])  # more than half of the time there is one
    for said, left in found:
        assert said == pytest.approx(left, rel=0.05, abs=1.0)


@pytest.mark.parametrize("job", JOBS)
def test_an_estimate_does_not_grow(job):
    said = [estimate for estimate, _ in estimates(JOBS[job]) if estimate is not None]
    assert all(later <= before + 1.0 for before, later in itertools.pairwise(said))


def test_nothing_is_said_before_the_pace_is_known():
    steps = layers(3, compiling=20.0)
    said = [estimate for estimate, _ in estimates(steps)]
    # Two weights are compiled for, and three more are done, before there is an estimate.
    first = next(i for i, estimate in enumerate(said) if estimate is not None)
    assert sum(step.nbytes > 0 and not step.programs for step in steps[: first // 2]) == 3


def test_a_step_that_takes_longer_than_expected_makes_no_negative_time():
    now = 0.0
    pace = Pace(5000, 0, clock=lambda: now)
    for _ in range(5):
        pace.begin(1000, 0)
        now += 1.0
    now += 100.0
    assert pace.seconds_left == 0.0


class Lines:
    """A file that keeps what is written."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def shown(steps, expected, monkeypatch, **of_console):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    said = Lines()
    with progress_on(Console(file=said, width=200, **of_console), 60_000, expected) as running:
        for step in steps:
            running.begin("w", step.nbytes, step.programs)
            now += step.seconds
            running.tell("w", step.nbytes, None)
    return said.text


def test_lines_say_what_is_left_once_it_is_known(monkeypatch):
    text = shown(layers(12, compiling=20.0), Expected(60_000, 2), monkeypatch)
    first, *_, last = text.splitlines()
    assert first == "0% of 0.06 MB, w (compiling shape 1 of 2)"
    assert "compiling shape 2 of 2" in text
    assert "about 5 s left" in text
    assert "left" not in last


def test_without_knowledge_no_time_is_estimated(monkeypatch):
    assert "left" not in shown(layers(12, compiling=20.0), None, monkeypatch)
