"""Rates, halving, ties and references are decided on figures alone: synthetic trials, in milliseconds."""

from __future__ import annotations

import math
import random

import pytest

from veneer.search.decide import grid, halving, reach
from veneer.search.decide.choose import choose, halve
from veneer.search.decide.trial import DIVERGED, FINISHED, GOING, Point, Progress, Trial
from veneer.search.decide.verdicts import ties_with_best, verdicts
from veneer.tasks import Metric

METRIC = Metric("loss", "nats")
STEPS = 80


class Synthetic:
    """Trainings whose loss is a bowl over log2(lr), with noise over seeds; rates above `limit` diverge."""

    metric, steps = METRIC, STEPS

    def __init__(self, best, *, floor=1.0, noise=0.0, limit=math.inf, draw=0):
        self.best, self.floor, self.noise, self.limit = best, floor, noise, limit
        self.draw, self.trained, self.dropped = draw, {}, {}

    def advance(self, trials, share):
        return {t: self.at(t, share) for t in trials}

    def at(self, t, share):
        self.trained[t] = max(share, self.trained.get(t, 0.0))
        if t.lr > self.limit:
            return Progress(share, DIVERGED, (), "its loss rose")
        end = self.floor + (math.log2(t.lr / self.best)) ** 2 / 10
        end += random.Random(f"{t.key} {self.draw}").gauss(0, self.noise)
        steps = range(0, round(share * STEPS) + 1, 10)
        points = tuple(Point(s, end + 2 * (1 - s / STEPS), s / 10) for s in steps)
        return Progress(share, FINISHED if share == 1 else GOING, points)

    def drop(self, trial, share, reason):
        self.dropped[trial] = (share, reason)

    @property
    def work(self):
        return sum(self.trained.values())


def test_a_grid_is_by_factors_of_two_around_its_centre():
    assert grid.around(1e-3, 5) == pytest.approx([2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3])
    assert grid.around(3e-3, 6)[2] == 3e-3 and len(grid.around(3e-3, 6)) == 6


@pytest.mark.parametrize(
    ("costs", "further"),
    [
        ({1.0: 3, 2.0: 2, 4.0: 3}, None),
        ({1.0: 1, 2.0: 2, 4.0: 3}, 0.5),
        ({1.0: 3, 2.0: 2, 4.0: 1}, 8.0),
        ({1.0: 3, 2.0: 2, 4.0: math.inf}, None),
        ({1.0: math.inf, 2.0: math.inf}, 0.5),
    ],
)
def test_a_grid_grows_beyond_a_best_edge(costs, further):
    assert grid.beyond(costs) == further


def test_the_better_half_survives_and_a_divergence_never():
    assert halving.survivors({"a": 3, "b": 1, "c": 2, "d": 4, "e": 5}) == ["a", "b", "c"]
    assert halving.survivors({"a": 3, "b": math.inf, "c": math.inf}) == ["a"]
    assert halving.survivors({"a": 1, "b": 1, "c": 1}, least=1) == ["a", "b"]


def test_the_work_of_a_pool_is_what_its_trials_take():
    for n in (2, 5, 6, 24):
        trainer = Synthetic(1.0)
        trials = [Trial("a", 2.0**i) for i in range(n)]
        halve(trainer, {"a": trials})
        assert halving.work(n) == trainer.work
    assert halving.work(24) / 24 < 0.33


@pytest.mark.parametrize("best", [0.01, 0.003, 0.04, 0.2, 0.0006])
def test_the_best_rate_is_found_on_the_grid_and_beyond_it(best):
    trainer = Synthetic(best)
    chosen = choose(trainer, {"a": grid.around(0.01, 5), "b": grid.around(0.02, 5)}, seed=0)
    for choice in chosen.values():
        assert abs(math.log2(choice.lr / best)) <= 0.5 and not choice.on_edge
        rates = sorted(t.trial.lr for t in choice.tried)
        assert rates[0] < choice.lr < rates[-1] and len(rates) >= 5
    assert trainer.work < sum(len(c.tried) for c in chosen.values())


def test_trials_end_early_with_their_place_and_divergences_stay_on_the_list():
    trainer = Synthetic(0.01, limit=0.015)
    (choice,) = choose(trainer, {"a": grid.around(0.01, 5)}, seed=0).values()
    assert choice.lr == 0.01
    reasons = {t.trial.lr: t.dropped for t in choice.tried}
    assert reasons[0.02] == reasons[0.04] == "its loss rose" and reasons[0.01] == ""
    early = {t: why for t, (_, why) in trainer.dropped.items()}
    assert all("of the steps" in why for why in early.values())


def test_a_contender_whose_trials_all_diverge_has_no_rate():
    trainer = Synthetic(0.01, limit=0.0)
    (choice,) = choose(trainer, {"a": grid.around(0.01, 5)}, seed=0).values()
    assert choice.lr is None and len(choice.tried) == 5 + grid.EXTENSIONS
    assert {t.progress.state for t in choice.tried} == {DIVERGED}


@pytest.mark.parametrize(
    ("losses", "worse", "found"),
    [
        ([2.0, 1.5, 1.2], True, ""),
        ([1.0] * 5 + [9.0] * 20, True, "its loss rose to"),
        ([1.0] * 5 + [9.0] * 20, False, ""),
        ([1.0, None, None], False, "2 of 3 steps were skipped"),
        ([], True, ""),
    ],
)
def test_a_divergence_is_seen_in_the_losses(losses, worse, found):
    why = halving.diverged(losses, worse_than_base=worse)
    assert why.startswith(found) and bool(why) == bool(found)


def scores(trainer, label, seeds):
    rate = choose(trainer, {label: grid.around(0.01, 5)}, seed=0)[label].lr
    trials = [Trial(label, rate, seed) for seed in seeds]
    return [p.best(METRIC) for p in trainer.advance(trials, 1.0).values()]


def compared(a, b, seeds=(0, 1, 2)):
    (found,) = verdicts({"a": scores(a, "a", seeds), "b": scores(b, "b", seeds)}, METRIC)
    return found


def test_twenty_comparisons_of_a_method_with_itself_call_a_difference_at_most_twice():
    calls = [
        compared(Synthetic(0.01, noise=0.02, draw=i), Synthetic(0.01, noise=0.02, draw=i)).better
        for i in range(20)
    ]
    assert sum(map(bool, calls)) <= 2


def test_a_planted_difference_is_found_in_words():
    found = compared(Synthetic(0.01, noise=0.01), Synthetic(0.01, floor=1.1, noise=0.01))
    assert found.better == "a" and found.sentence(METRIC).startswith("a beats b (a - b: -0.")
    tie = compared(Synthetic(0.01, noise=0.01), Synthetic(0.01, noise=0.01))
    assert tie.sentence(METRIC).startswith("a and b tie: the difference is inside the noise (")


def test_one_seed_cannot_tell():
    (found,) = verdicts({"a": [1.0], "b": [2.0]}, METRIC)
    assert found.better == "" and found.sentence(METRIC).endswith("cannot tell this from noise")


def test_higher_may_be_better():
    accuracy = Metric("accuracy", lower_is_better=False)
    (found,) = verdicts({"a": [0.9, 0.91, 0.9], "b": [0.5, 0.51, 0.5]}, accuracy)
    assert found.better == "a"


def test_many_pairs_need_larger_differences():
    two = {"a": [1.0, 1.02, 1.04], "b": [1.05, 1.07, 1.09]}
    (alone,) = verdicts(two, METRIC)
    assert alone.better == "a"
    many = verdicts({**two, **{f"c{i}": [3.0, 3.5, 4.0 + i] for i in range(6)}}, METRIC)
    assert many[0].better == ""


def test_ties_with_the_best_are_listed_best_first():
    three = {"a": [1.0, 1.01, 0.99], "b": [0.99, 1.0, 1.0], "c": [2.0, 2.01, 1.99]}
    means = {label: sum(v) / 3 for label, v in three.items()}
    assert ties_with_best(verdicts(three, METRIC), means, METRIC) == ["b", "a"]
    assert ties_with_best([], {}, METRIC) == []


def test_the_reference_is_reached_between_two_evaluations():
    points = (Point(0, 2.0, 0.0), Point(10, 1.0, 5.0), Point(20, 0.9, 9.0))
    assert reach.reached(points, reach.reference(2.0, 1.0), METRIC) == pytest.approx((9.0, 4.5))
    assert reach.reached(points, 0.5, METRIC) is None
    assert reach.reached(points, 2.5, METRIC) == (0, 0.0)


def test_trials_have_names_of_their_own():
    trials = [Trial("lora", 5e-3), Trial("lora", 5e-3, 1), Trial("lora", 5e-3, 0, 0.25), Trial("a/b", 5e-3)]
    assert [t.key for t in trials] == [
        "lora-0.005-s0",
        "lora-0.005-s1",
        "lora-0.005-s0-x0.25",
        "a+b-0.005-s0",
    ]
