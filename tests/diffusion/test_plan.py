from __future__ import annotations

from itertools import chain
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.models.diffusion.propagation.load import load_plan, plan_names
from ldm.models.diffusion.propagation.plan import CALLS, SIZES, Compute, Plan, with_few_sizes
from tests.helpers.toy import plans


def quad_center(steps: int, keys: int, center: int = 15, power: float = 1.4) -> tuple[int, ...]:
    """DeepCache's non-uniform keys: evenly spaced in a root of the distance from the center, its real part rounded."""
    ends = (complex(-center) ** (1 / power), complex(steps - center) ** (1 / power))
    inner = {int((z**power).real) for z in np.linspace(*ends, keys + 1)}
    return (0, *(center + offset for offset in sorted(inner)[1:-1]))


FASTER_50 = (0, 1, 2, 3, 5, 10, 15, 25, 35)
# What the sources state about each list, in their own terms.
PUBLISHED = {
    ("faster-diffusion", 50): FASTER_50,
    ("faster-diffusion", 20): (0, 1, 2, 3, 5, 10, 15),
    ("ldm250", 250): (
        *range(6),
        10,
        15,
        25,
        35,
        55,
        75,
        85,
        *range(95, 100),
        110,
        125,
        135,
        140,
        *range(145, 150),
        155,
        160,
        *range(170, 175),
        185,
        *range(195, 200),
        210,
        222,
        223,
        224,
        235,
        247,
        248,
        249,
    ),
    ("ldm250-demo", 250): (*range(6), 10, 25, 55, 85, 110, 135, 155, 160, 185, 195, 235, 248, 249),
    ("dit250", 250): tuple(i for i in range(250) if not (1 <= i <= 229 and i % 10 < 6)),
    ("if-stage1", 100): tuple(i for i in range(100) if i < 10 or i > 85 or i % 5 == 0),
    ("if-stage1", 25): tuple(i for i in range(25) if i < 10 or i % 5 == 0),
    ("if-stage2", 50): tuple(i for i in range(50) if i < 20 or i > 40 or i % 2 == 0),
    ("if-stage2", 25): tuple(i for i in range(25) if i < 20 or i % 2 == 0),
    ("if-stage3", 50): tuple(i for i in range(50) if sqrt(9 + 8 * i).is_integer()),
    ("if-stage3", 75): tuple(75 - t for t in (75, 73, 70, 66, 61, 55, 48, 40, 31, 21, 10)),
    ("uniform-1", 50): tuple(50 - t for t in range(50, 0, -2)),
    ("uniform-2", 50): tuple(50 - t for t in (50, 44, 38, 32, 26, 20, 14, 8, 2)),
    ("uniform-3", 50): tuple(50 - t for t in (50, 38, 26, 14, 2)),
    ("nonuniform-1", 50): tuple(50 - t for t in (50, 40, 39, 38, 30, 25, 20, 15, 5)),
    ("nonuniform-2", 50): tuple(50 - t for t in (50, 30, 25, 20, 15, 14, 5, 4, 3)),
    ("nonuniform-3", 50): tuple(50 - t for t in (50, 41, 37, 35, 22, 21, 18, 14, 5)),
    ("nonuniform-4", 50): FASTER_50,
    ("spectrum", 50): (*range(5), 6, 8, 11, 15, 20, 25, 31, 38, 46),
    ("deepcache-nonuniform-3", 50): quad_center(50, 17),
    ("deepcache-nonuniform-5", 50): quad_center(50, 10),
    ("deepcache-nonuniform-10", 50): quad_center(50, 5),
}
COUNTS = {
    ("ldm250", 250): 48,
    ("ldm250-demo", 250): 19,
    ("dit250", 250): 113,
    ("if-stage1", 100): 40,
    ("if-stage1", 25): 13,
    ("if-stage2", 50): 40,
    ("if-stage3", 75): 11,
    ("uniform-1", 50): 25,
}


@pytest.mark.parametrize("name, steps", PUBLISHED)
def test_published_keys(name, steps):
    keys = load_plan(name, steps).keys
    assert keys == PUBLISHED[name, steps]
    assert len(keys) == COUNTS.get((name, steps), len(keys))


def test_every_plan_is_checked_here():
    assert set(plan_names()) == {name for name, _ in PUBLISHED}


@given(n=st.integers(1, 60), data=st.data())
def test_batches_cover_every_node_once(n, data):
    plan = data.draw(plans(n))
    batches = list(plan.batches())
    assert tuple(batch.nodes[0] for batch in batches if batch.compute is Compute.FULL) == plan.keys
    assert list(chain.from_iterable(batch.nodes for batch in batches)) == list(range(n))
    assert max(len(batch.nodes) for batch in batches) <= plan.parallel
    assert tuple(i for i, work in enumerate(plan.computes()) if work is Compute.FULL) == plan.keys


@settings(max_examples=40)
@given(n=st.integers(1, 60), most=st.integers(1, 30), data=st.data())
def test_few_sizes_are_worth_their_first_calls(n, most, data):
    plan = data.draw(plans(n))
    cut = with_few_sizes(plan, most)
    lengths = [len(batch.nodes) for batch in cut.batches()]
    assert cut.computes() == plan.computes() and cut.settings() == plan.settings()
    assert {*lengths} <= {1, *cut.sizes} and len(cut.sizes) <= SIZES and max(lengths) <= min(cut.parallel, most)
    assert len(lengths) + CALLS * len(cut.sizes) <= n, "never more than one by one"
    assert len(lengths) + CALLS * len(cut.sizes) <= min(
        sum(sum(divmod(len(group.nodes), size)) for group in Plan(n, plan.keys, n).batches()) + CALLS * (size > 1)
        for size in range(1, most + 1)
    ), "never more than with any one size"


def test_the_published_plan_is_cut_into_fives():
    cut = with_few_sizes(load_plan("faster-diffusion", 50), 24)
    assert [len(batch.nodes) for batch in cut.batches()] == [1] * 5 + [5] * 9
    assert with_few_sizes(load_plan("off", 50), 24).sizes == with_few_sizes(load_plan("uniform:3", 50), 1).sizes == ()
    assert with_few_sizes(load_plan("deepcache:3", 50), 24).sizes == ()


@pytest.mark.parametrize("name", plan_names())
@given(n=st.integers(1, 400))
def test_a_named_plan_fits_any_run(name, n):
    plan = load_plan(name, n)
    assert plan.num_nodes == n and plan.keys[0] == 0


def test_the_longest_list_scales():
    assert load_plan("faster-diffusion", 100).keys == (0, 2, 4, 6, 10, 20, 30, 50, 70)
    assert load_plan("faster-diffusion", 51).keys == FASTER_50
    assert load_plan("faster-diffusion", 10).keys == (0, 1, 2, 3, 5, 7)


@pytest.mark.parametrize(
    "spec, keys",
    [
        ("off", tuple(range(12))),
        ("uniform:5", (0, 5, 10)),
        ("uniform:1", tuple(range(12))),
        ("uniform:99", (0,)),
        ("0", (0,)),
        ("0,1,2,5", (0, 1, 2, 5)),
        ("0-2, 7", (0, 1, 2, 7)),
    ],
)
def test_general_forms(spec, keys):
    plan = load_plan(spec, 12, parallel=3)
    assert plan == Plan(12, keys, 3)


@pytest.mark.parametrize(
    "text, keys",
    [
        ("source: mine\nsteps: {10: [0, 3-5]}", (0, 6, 8, 10)),
        ("source: mine\nevery: 7", (0, 7, 14)),
        ("source: mine\nwindow: {warm_up: 2, first: 3, growth: 1.5}", (0, 1, 4, 8, 14)),
        ("source: mine\nwindow: {warm_up: 40, first: 3, growth: 0}", tuple(range(20))),
        ("source: mine\nsame_as: 'uniform:8'", (0, 8, 16)),
    ],
)
def test_plan_files(tmp_path, text, keys):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert load_plan(str(file), 20).keys == keys


@pytest.mark.parametrize(
    "text, why",
    [
        ("source: a\nstep: {10: [0]}", "step"),
        ("steps: {10: [0]}", "source"),
        ("source: a", "exactly one"),
        ("source: a\nevery: 2\nsame_as: ldm250", "exactly one"),
        ("- 1", "not a plan"),
        ("a: [", "not a plan"),
        ("source: a\nsteps: [0]", "steps.* should be"),
        ("source: a\nsteps: {10: 0}", "steps.* should be"),
        ("source: a\nevery: two", "every.* should be"),
        ("source: a\nevery: true", "every.* should be"),
        ("source: [a]\nevery: 2", "source should be"),
        ("source: a\nsteps: {ten: [0]}", "steps.* should be"),
        ("source: a\nsteps: {4294967295: [0]}", "steps.* should be"),
        ("source: a\nsteps: {20: [{0: 1}]}", "9 digits, or ranges"),
        ("source: a\nsteps: {20: [0-400000000]}", "past the last node 19"),
        ("source: a\nsteps: {50: [0-400000000]}", "past the last node 49"),
        ("source: a\nsame_as: mine.yaml", "same_as.* should be"),
        ("source: a\nevery: 2\npropagate: [hold]", "propagate.* should be"),
        ("source: a\nevery: 2\nmade_for: [ddim]", "made_for.* should be"),
        ("source: a\nwindow: {warm_up: 0, first: 3, growth: 1}", "window.warm_up should be"),
        ("source: a\nwindow: {warm_up: 1, first: 0.5, growth: 1}", "window.first should be"),
        ("source: a\nwindow: {warm_up: 1, first: 2, growth: .nan}", "window.growth should be"),
        ("source: a\nwindow: 3", "window should be"),
    ],
)
def test_faulty_plan_files_say_why(tmp_path, text, why):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=why) as error:
        load_plan(str(file), 20)
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec, why",
    [
        ("fastest", "faster-diffusion"),
        ("fastest", r"uniform:N"),
        ("uniform:0", "needs N >= 1"),
        ("uniform:x", "unknown plan"),
        ("1,2", "node 0"),
        ("0,2,2", "strictly"),
        ("0,5,3", "strictly"),
        ("0,50", "past the last node 49"),
        ("0,a", "'a'"),
        ("0,,1", "numbers"),
        ("3-1", "strictly; got 3-1"),
        ("0-400000000", "key 400000000 is past the last node 49"),
        ("0,1," + "9" * 5000, "must be numbers of at most 9 digits, or ranges such as 0-3; got '9999"),
        ("skip:" + "9" * 5000, "must be numbers of at most 9 digits, or ranges such as 0-3; got '9999"),
        ("uniform:" + "9" * 5000, "unknown plan"),
        ("auto:" + "9" * 5000, "auto:9, .* auto:80%"),
        ("auto:1.0", "auto:9, .* auto:80%; got 'auto:1.0'"),
        ("auto:101%x", "auto:80%"),
        ("", "unknown plan"),
        ("missing.yaml", "cannot be read"),
    ],
)
def test_bad_specs_say_why(spec, why):
    with pytest.raises(ValueError, match=why):
        load_plan(spec, 50)


@pytest.mark.parametrize(
    "keys, parallel, why",
    [
        ((), 1, "node 0"),
        ((1,), 1, "node 0"),
        ((0, 2, 2), 1, "strictly"),
        ((0, 50), 1, "past the last"),
        ((0,), 0, "parallel"),
    ],
)
def test_bad_plans_say_why(keys, parallel, why):
    with pytest.raises(ValueError, match=why):
        Plan(50, keys, parallel)


@pytest.mark.parametrize("shallow, wrong", [((11,), r"\[11\]"), ((0, 1, 12), r"\[0, 1, 12\]"), ((-3, 4), r"\[-3\]")])
def test_shallow_nodes_that_can_not_be_are_named(shallow, wrong):
    with pytest.raises(ValueError, match=rf"1\.\.9 and no key nodes; got {wrong}"):
        Plan(10, (0, 1), shallow=shallow)


def test_a_batch_has_nodes():
    with pytest.raises(ValueError, match=r"sizes must be at least 1 decoder step per batch; got \(4, 0\)"):
        Plan(50, (0,), sizes=(4, 0))


def test_a_run_has_nodes():
    with pytest.raises(ValueError, match="num_nodes"):
        load_plan("off", 0)
