"""From finished runs to the study's report: figures, statistics, activation, words, pictures, with slow oracles."""

import doctest
import itertools
import math
import re
from dataclasses import replace
from statistics import fmean, stdev

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_optim import Action, Movement
from step_optim.budget import Limits
from tests.examples.study_runs import PLAN, SLICES, STUDY, branches, run, whole_study

# What follows is found through the path that tests.study_runs has set.
from study import traces  # isort: skip
from study.config import Batch  # isort: skip
from study.reporting import activation, answers, findings, forks, mechanisms, paired, setting, style, wording  # isort: skip
from study.reporting import figures as figures_module  # isort: skip
from study.reporting.evidence import METRICS, Evidence  # isort: skip
from study.reporting.figures import composite, figures, share_within  # isort: skip
from study.traces import Run, load_runs, save_runs  # isort: skip

ALL = whole_study()
SECTIONS = [
    "# Does a trust region after the optimizer step help?",
    "## Activation and integrity",
    "## Setup",
    "## Results",
    "## Learning rates",
    "## Branches from the same weights",
    "## Beside the paper's Table 2",
    "## Plain answers",
    "## What cannot be claimed",
]
DIFFERENCES = st.lists(st.floats(-1, 1, allow_nan=False).map(lambda x: round(x, 3)), min_size=1, max_size=9)


def relabelled(original: Run, **changes) -> Run:
    """A copy of a run under another name."""
    return replace(original, **changes)


def evidence_of(runs) -> Evidence:
    """Runs under the toy's settings and plan."""
    return Evidence(runs, study=STUDY, plan=PLAN)


def check(runs, made) -> activation.Activation:
    """The check of activation under the toy's settings."""
    return activation.check(runs, made, STUDY)


def write(runs, made, out, *, study=STUDY, plan=PLAN, commands=("make study",)):
    """The report under the toy's settings and plan."""
    return findings.write(runs, made, out, study=study, plan=plan, commands=commands)


def with_budgets(original: Run, limits: Limits) -> Run:
    """The same steps, as if other budgets had been in force."""
    return replace(original, records=tuple(replace(record, budget=limits) for record in original.records))


# Figures of one run


@pytest.mark.parametrize("key", [("shocks", "fixed", 0), ("shocks", "interpolate", 1), ("high_lr", "gate_keep", 2)])
def test_the_composite_metric_is_what_its_formula_says(key):
    """M from the updates, one by one."""
    made = run(*key)
    stability, worst = [], []
    for record, update in zip(made.records, made.updates, strict=True):
        if record.action is not Action.REJECT:
            stability.append(min(1, 0.02 / update["held"]["mean"]))
            worst.append(min(1, 0.04 / max(update["held"]["slices"].values())))
    gain = made.result["reward"] - made.result["reward_before"]
    found = figures(made, STUDY)
    assert found.gain == gain > 0
    assert found.stability == pytest.approx(fmean(stability))
    assert found.worst_stability == pytest.approx(fmean(worst))
    assert found.score == pytest.approx(gain * fmean(stability) * fmean(worst))


@given(
    gain=st.floats(-1, 1),
    first=st.floats(0, 1),
    second=st.floats(0, 1),
)
def test_instability_never_improves_the_metric(gain, first, second):
    """M is at most the gain, has its sign, and a loss is not made smaller by instability."""
    score = composite(gain, first, second)
    assert score <= max(gain, 0) if gain > 0 else score == gain
    assert score == gain or gain > 0


@given(kls=st.lists(st.floats(0, 10), max_size=20), tolerance=st.floats(1e-3, 1))
def test_stability_is_a_share(kls, tolerance):
    """S is in [0, 1], 1 if all is within tolerance or nothing was accepted, and falls if a movement grows."""
    share = share_within(kls, tolerance)
    assert 0 <= share <= 1
    assert share == 1 or max(kls) > tolerance
    assert share_within([2 * kl for kl in kls], tolerance) <= share


def test_rejecting_everything_is_perfectly_stable_and_says_so(tmp_path):
    """S = 1 of a run that accepts nothing; the table names it."""
    stuck = run("high_lr", "gate", 0)
    found = figures(stuck, STUDY)
    assert (found.accepted, found.rejected, found.longest_rejection) == (0, 16, 16)
    assert (found.stability, found.worst_stability, found.score) == (1, 1, found.gain)
    assert found.ratio_mean is None
    assert found.reward_per_length is None
    report = write([stuck], [], tmp_path).read_text()
    assert "Global gate (1 seed accepted nothing)" in report


def test_triggers_are_compared_with_the_known_shocks():
    """Precision and recall, counted; undefined without shocks, without budgets, without triggers."""
    made = run("shocks", "interpolate", 0)
    triggered = {record.step for record in made.records if record.triggered}
    found = figures(made, STUDY)
    assert triggered > set(STUDY.shocks)
    assert found.precision == len(STUDY.shocks) / len(triggered)
    assert found.recall == 1
    assert figures(run("high_lr", "interpolate", 0), STUDY).recall is None
    assert figures(run("shocks", "fixed", 0), STUDY).recall is None
    calm = tuple(replace(record, triggered=False) for record in made.records)
    found = figures(replace(made, records=calm), STUDY)
    assert (found.precision, found.recall) == (None, 0)


def test_other_figures_of_a_run_are_counted_right():
    """Rates, alpha, residuals, ratios, budgets and costs, by another way."""
    made = run("shocks", "project", 0)
    found = figures(made, STUDY)
    triggered = [record for record in made.records if record.triggered]
    assert found.trigger_rate == found.project_rate == len(triggered) / 16
    assert (found.alphas, found.mean_alpha) == ((), None)
    assert found.residual_ratio == pytest.approx(0.8)
    assert found.residual == pytest.approx(fmean(record.projection["residual"] for record in triggered))
    assert found.over_budget == 0
    held = [update["held"] for update in made.updates]
    alike = [[h["slices"][name] for name in SLICES] for h in held]
    assert found.over_own == 0
    assert found.over_own_held == sum(fmean(kls) > 0.03 or max(kls) > 0.05 for kls in alike) > 0
    control = sum(record.accepted.mean for record in made.records)
    assert found.ratio_mean == pytest.approx(sum(map(fmean, alike)) / control)
    worst = sum(max(record.accepted.slices.values()) for record in made.records)
    assert found.ratio_worst == pytest.approx(sum(map(max, alike)) / worst)
    unseen = sum((h["slices"]["advice"] + h["slices"]["translate"]) / 2 for h in held)
    assert found.ratio_unseen == pytest.approx(unseen / control)
    assert found.unseen_gain == pytest.approx(0.9 * found.gain)
    length = sum(math.sqrt(record.accepted.mean) for record in made.records)
    assert found.reward_per_length == pytest.approx(found.gain / length)
    own = 16 * 0.61 + 11 * len(triggered)
    assert found.overhead_seconds == pytest.approx(own)
    assert found.overhead_updates == pytest.approx(own / 16 / 6)
    assert found.audits_per_step == 1 + 2 * len(triggered) / 16
    assert figures(run("shocks", "fixed", 0), STUDY).over_budget >= len(STUDY.shocks)


def test_mean_alpha_counts_a_rejection_as_nothing():
    """Over triggers, as in the optimizer's own summary."""
    assert figures(run("shocks", "gate", 0), STUDY).mean_alpha == 0
    found = figures(run("high_lr", "interpolate", 0), STUDY)
    assert len(found.alphas) == 16
    assert found.mean_alpha == pytest.approx(fmean(found.alphas))


def test_a_run_that_is_not_whole_is_refused():
    """With its name and its counts."""
    made = run("shocks", "fixed", 0)
    with pytest.raises(ValueError, match=r"shocks/fixed/0 has 15 step records and 16 updates"):
        figures(replace(made, records=made.records[1:]), STUDY)


# Statistics


@pytest.mark.parametrize("module", [figures_module, paired, setting, style, traces, wording])
def test_the_examples_in_docstrings_are_true(module):
    """They are not among the doctests of the package."""
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


@given(differences=DIFFERENCES)
def test_the_sign_flip_test_agrees_with_going_through_all_signs(differences):
    """The exact p, in rational arithmetic; its least value; the same after a change of sign or of order."""
    exact = [round(1000 * d) for d in differences]
    sums = [
        abs(sum(s * d for s, d in zip(signs, exact, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(exact))
    ]
    p = paired.sign_flip(differences)
    assert p == sum(value >= abs(sum(exact)) for value in sums) / len(sums)
    assert p >= paired.smallest_p(len(differences))
    assert paired.sign_flip([-d for d in differences]) == p
    assert paired.sign_flip(sorted(differences)) == p


def test_all_of_one_sign_reaches_the_least_p():
    """2^(1-n), which is .05 or less from 6 pairs on."""
    for n in range(1, 13):
        assert paired.sign_flip([1.0 + i for i in range(n)]) == paired.smallest_p(n)
        assert (paired.smallest_p(n) < 0.05) == (n >= paired.SEEDS_FOR_P)


def test_many_pairs_are_drawn_and_agree_with_the_exact_test():
    """Monte Carlo beyond 20 pairs, never 0; near the exact p at the edge."""
    random = np.random.default_rng(0)
    values = random.normal(0.3, 1, 20)
    exact = paired.sign_flip(values)
    drawn = (np.abs(paired._drawn_sums(values)) >= abs(values.sum())).mean()
    assert drawn == pytest.approx(exact, abs=0.015)
    assert 0 < paired.sign_flip([1.0] * 40) == 1 / (paired.DRAWS + 1)


def test_the_bootstrap_of_three_agrees_with_all_27_resamples():
    """Percentiles of the mean, by enumeration; the interval of three is close to the three themselves."""
    values = [0.1, 0.4, 1.0]
    means = sorted(fmean(drawn) for drawn in itertools.product(values, repeat=3))
    low, high = (means[math.ceil(27 * share) - 1] for share in (0.025, 0.975))
    found = paired.of(dict(enumerate(values)))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.effect == pytest.approx(fmean(values) / stdev(values))


@given(differences=DIFFERENCES, scale=st.sampled_from([0.5, 2.0, -1.0]))
@settings(max_examples=15)
def test_intervals_move_with_the_data(differences, scale):
    """They hold the mean, scale with it, and are the same each time; d_z has no scale."""
    found = paired.of(dict(enumerate(differences)))
    again = paired.of({i: scale * d for i, d in enumerate(differences)})
    assert found == paired.of(dict(enumerate(differences)))
    if len(differences) == 1:
        assert (found.low, found.p, found.effect) == (None, None, None)
        return
    assert found.low - 1e-12 <= found.mean <= found.high + 1e-12
    if scale > 0:
        assert again.low == pytest.approx(scale * found.low)
        assert again.effect == pytest.approx(found.effect)
    assert again.p == found.p
    assert not any(map(math.isnan, (found.low, found.high, found.effect, found.effect_low, found.effect_high)))


def test_equal_differences_have_an_endless_effect_and_no_nan():
    """Infinite by sign, 0 for zeros; also where rounding parts them."""
    assert paired.of({0: 0.0, 1: 0.0, 2: 0.0}).effect == 0
    assert paired.of({0: -0.5, 1: -0.5, 2: -0.5}).effect == -math.inf
    found = paired.of({0: 0.1 + 0.2, 1: 0.3, 2: 0.3})
    assert found.effect == found.effect_high == math.inf
    assert found.direction == 1
    assert paired.of({0: 0.0, 1: 0.0, 2: 0.0}).direction == 0
    assert paired.of({0: 1e-17, 1: 0.01, 2: 0.02}).direction == 0


def test_a_policy_that_diverged_is_unstable_and_hides_nothing_else(tmp_path):
    """Held-out movement of NaN: S counts it as 0, it is saved and read again, and the report is written."""
    made = run("shocks", "fixed", 0)
    slices = {**made.updates[-1]["held"]["slices"], "math": math.nan}
    last = {**made.updates[-1], "held": {"mean": math.nan, "slices": slices}}
    result = {**made.result, "nll": math.inf, "drift": {"mean": math.nan, "slices": {}}}
    wild = replace(made, updates=(*made.updates[:-1], last), result=result)
    whole, found = figures(made, STUDY), figures(wild, STUDY)
    assert found.stability < whole.stability
    assert math.isnan(found.held_worst_max)
    save_runs(tmp_path / "runs.jsonl.gz", [wild])
    (again,) = load_runs(tmp_path / "runs.jsonl.gz")
    assert math.isnan(again.updates[-1]["held"]["mean"])
    assert again.result["nll"] == math.inf
    others = [r for r in ALL if r.name != made.name]
    text = write([*others, again], [], tmp_path).read_text()
    assert "Fixed-reference KL PPO" in text
    check_text(text)


def test_what_was_not_measured_is_not_compared():
    """Pairs without one of the figures are left out; NaN is refused."""
    found = paired.contrast({0: 1.0, 1: None, 2: 5.0, 3: 7.0}, {0: 0.5, 1: 1.0, 2: None})
    assert (found.pairs, found.differences) == ((0,), (0.5,))
    assert paired.contrast({}, {}).n == 0
    assert paired.contrast({0: math.nan, 1: 1.0}, {0: 1.0, 1: math.inf}).n == 0
    with pytest.raises(ValueError, match="must be finite"):
        paired.of({0: math.nan})


@given(ps=st.lists(st.floats(0, 1), max_size=8))
def test_holm_agrees_with_its_definition(ps):
    """The largest of (m - j + 1) p_(j) up to one's own rank, at most 1; never below p, in the order of p."""
    adjusted = paired.holm(ps)
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    for rank, i in enumerate(order):
        oracle = max(min(1.0, (len(ps) - j) * ps[order[j]]) for j in range(rank + 1))
        assert adjusted[i] == oracle
        assert adjusted[i] >= ps[i]
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_families_leave_the_primary_contrast_out():
    """Holm over the other conditions of the arm; the primary has its own p, and its components theirs."""
    evidence = evidence_of(ALL)
    family = evidence.family("score", "shocks")
    assert "interpolate" not in family
    assert "fixed" not in family
    assert [found.holm for found in family.values()] == paired.holm([found.p for found in family.values()])
    assert evidence.primary["score"].holm is None
    assert evidence.primary["score"].n == 9
    components = [evidence.primary[name] for name in ("gain", "stability", "worst_stability")]
    assert [found.holm for found in components] == paired.holm([found.p for found in components])


def test_the_tuned_baseline_is_the_best_of_the_grid():
    """By mean M, over the arms without shocks; other arms are then paired with it by seed."""
    evidence = evidence_of(ALL)
    assert evidence.grid == ["low_lr", "nominal", "double_lr", "high_lr"]
    means = {arm: fmean(evidence.known(arm, "fixed", "score")) for arm in evidence.grid}
    assert evidence.tuned == max(means, key=means.get) == "nominal"
    found = evidence.contrast("gain", "high_lr", "project", "fixed", "nominal")
    ours, theirs = evidence.of("high_lr", "project"), evidence.of("nominal", "fixed")
    assert found.differences == tuple(ours[seed].gain - theirs[seed].gain for seed in (0, 1, 2))


# Activation


def test_a_good_study_passes():
    """Every controller acted, and every trace is its own."""
    found = check(ALL, branches())
    assert found.ok, str(found)
    assert "shocks/gate/0: triggered 25%" in str(found)
    assert str(found).endswith("\nok")


def test_a_label_on_another_conditions_runs_fails():
    """The paper's failure: two labels, one trace."""
    copies = [relabelled(r, condition="ema") for r in ALL if (r.arm, r.condition) == ("shocks", "fixed")]
    runs = [r for r in ALL if (r.arm, r.condition) != ("shocks", "ema")] + copies
    found = check(runs, [])
    assert not found.ok
    assert "IDENTICAL: shocks/fixed and shocks/ema have the same trace on seed 0" in str(found)


def test_one_copied_seed_is_enough():
    """Both conditions acted, and yet one seed of them is the same."""
    copy = relabelled(run("shocks", "interpolate", 1), condition="project")
    runs = [r for r in ALL if r.name != "shocks/project/1"] + [copy]
    assert "shocks/interpolate and shocks/project have the same trace on seed 1" in str(check(runs, []))


def test_one_controller_under_two_budgets_may_coincide_on_a_seed():
    """A gate and a circuit breaker that meet the same shocks decide the same; not on every seed, or they are one."""
    runs = [r for r in ALL if r.condition != "breaker"]
    copies = [relabelled(run("shocks", "gate", seed), condition="breaker") for seed in (0, 1, 2)]
    found = check([*runs, *copies], [])
    assert not found.ok
    assert "IDENTICAL: shocks/gate and shocks/breaker have the same trace on seed 1" in str(found)
    found = check([*runs, copies[1], *(r for r in ALL if r.name in ("shocks/breaker/0", "shocks/breaker/2"))], [])
    assert found.ok, str(found)
    assert "have the same trace on seed 1: their budgets bound at the same updates" in str(found)


def test_policies_that_went_the_same_way_are_one_condition():
    """Records that differ in words do not help if held-out prompts saw the same policies."""
    disguised = run("shocks", "fixed", 0)
    records = tuple(replace(record, reward=9.0) for record in disguised.records)
    runs = [run("shocks", "fixed", 0), replace(disguised, condition="ema", records=records)]
    assert "shocks/fixed and shocks/ema have the same path on seed 0" in str(check(runs, []))


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        (Limits(), "NO BUDGET: shocks/gate/2 is a controller's label, but all its budgets are infinite"),
        (Limits(mean=99.0), "NEVER ACTED: shocks/gate, on none of its 3 seeds"),
    ],
)
def test_a_controller_whose_budget_never_binds_fails(limits, problem):
    """Infinite, or so large that nothing exceeds it."""
    others = [r for r in ALL if (r.arm, r.condition) != ("shocks", "gate")]
    calm = [with_budgets(relabelled(run("shocks", "target_kl", seed), condition="gate"), limits) for seed in (0, 1, 2)]
    found = check([*others, *calm], [])
    assert not found.ok
    assert any(text.startswith(problem) for text in found.problems)
    assert any(text.startswith("NEVER ACTED: shocks/gate") for text in found.problems)


def test_a_controller_that_was_idle_on_one_seed_is_a_note():
    """Also that it then has the baseline's trace there."""
    idle = with_budgets(relabelled(run("shocks", "fixed", 1), condition="gate"), Limits(mean=99.0))
    found = check([r for r in ALL if r.name != "shocks/gate/1"] + [idle], [])
    assert found.ok
    assert "note: shocks/gate/1 never acted" in str(found)
    assert "have the same trace on seed 1: one of them was idle" in str(found)


def test_a_controller_with_nothing_to_do_in_a_calm_arm_is_a_note():
    """If it acted elsewhere, it is the baseline there, and no comparison is made; if nowhere, it voids the study."""
    limits = Limits(mean=99.0)
    calm = [with_budgets(relabelled(run("nominal", "fixed", seed), condition="gate"), limits) for seed in (0, 1, 2)]
    found = check([*ALL, *calm], [])
    assert found.ok, str(found)
    assert "note: nominal/gate never acted, on none of its 3 seeds, and is the baseline there" in str(found)
    assert "note: nominal/fixed and nominal/gate have the same trace on seed 0: one of them was idle" in str(found)
    said = list(answers.in_short(evidence_of([*ALL, *calm])))
    assert f"{answers.NEVER}: Global gate (nominal)" in said
    alone = check([r for r in ALL if r.condition != "gate"] + calm, [])
    assert not alone.ok
    assert "NEVER ACTED: nominal/gate" in str(alone)


def test_a_baselines_own_mechanism_must_act_too():
    """Target-KL stopping that never stopped, a cap that never held, a coefficient that never moved."""
    for condition, field, value in (
        ("target_kl", "minibatches", 4),
        ("ratchet_cap", "reference", "moved"),
        ("adaptive_kl", "beta", 0.1),
    ):
        made = run("shocks", condition, 0)
        still = replace(made, updates=tuple({**update, field: value} for update in made.updates))
        assert not activation.is_idle(made, STUDY)
        assert f"NEVER ACTED: shocks/{condition}, on none of its 1 seeds" in str(check([still], []))


def test_a_baseline_with_a_budget_fails():
    """A label that should only measure."""
    found = check([with_budgets(run("shocks", "fixed", 0), Limits(mean=0.03))], [])
    assert "BUDGET: shocks/fixed/0 is a baseline's label" in str(found)


def test_a_commit_beyond_its_own_budget_fails():
    """What no controller may do, whatever its records say of it."""
    wild = with_budgets(run("shocks", "gate", 0), Limits(mean=0.001))
    assert "OVER BUDGET: shocks/gate/0 committed more than its own budget at updates [0, 1, 2, 4" in str(
        check([wild], [])
    )


def test_damaged_repeated_and_unequal_runs_are_named():
    """And the report is written all the same."""
    first, second = run("shocks", "fixed", 0), run("shocks", "fixed", 1, updates=9)
    runs = [first, first, second, replace(first, seed=7, records=())]
    text = str(check(runs, []))
    assert "DAMAGED: shocks/fixed/7 has 0 records of 16 updates" in text
    assert "TWICE: shocks/fixed/0" in text
    assert "LENGTHS: the runs of shocks have [0, 9, 16] updates" in text


def test_arms_and_seeds_must_differ():
    """The same samples under another seed, or another arm."""
    same = [run("nominal", "fixed", 0), relabelled(run("nominal", "fixed", 0), seed=1)]
    assert "IDENTICAL: nominal/fixed/0 and nominal/fixed/1" in str(check(same, []))


def test_branches_that_are_one_fail():
    """Two names for one decision, and a shrink that had nothing to shrink."""
    made = branches()
    copies = [b | {"branch": "project"} for b in made if b["branch"] == "shrink"]
    found = check(ALL, [b for b in made if b["branch"] != "project"] + copies)
    assert "IDENTICAL: the branches shrink and project agree in every figure at all 5 points" in str(found)
    few = [b for b in made if b["branch"] != "project"] + copies
    found = check(ALL, [b for b in few if b["seed"] == 2])
    assert found.ok
    assert "note: the branches shrink and project agree in every figure at all 1 points" in str(found)
    whole = [b | {"alpha": 1.0} if b["branch"] == "shrink" else b for b in made]
    assert "NEVER ACTED: the branch shrink" in str(check(ALL, whole))


# Words


@given(differences=DIFFERENCES)
@settings(max_examples=15)
def test_a_difference_is_only_called_one_if_its_interval_excludes_zero(differences):
    """Higher, lower or nothing to see; with few seeds also what no p could have shown."""
    found = paired.of(dict(enumerate(differences)))
    text = wording.verdict(found)
    if found.n < 3:
        assert text.startswith("cannot be judged")
        return
    assert ("is higher" in text) == (found.low > 0)
    assert ("is lower" in text) == (found.high < 0)
    assert ("no difference that this study can see (interval" in text) == (found.low <= 0 <= found.high)
    if found.direction and found.n < 6:
        agree = sum(math.copysign(1, d) == found.direction and d != 0 for d in differences)
        assert f"on {agree} of {found.n} seeds)" in text
    elif found.direction:
        assert f"{found.n} seeds, p = {found.p:.3g})" in text


def signed(direction: int, n: int = 9) -> paired.Contrast:
    """A contrast of a known direction."""
    return paired.of({i: direction + (0.1 * (-1) ** i if direction else (-1.0) ** i) for i in range(n)})


def test_every_combination_of_signs_has_its_conclusion():
    """Nine sentences, none of them twice; weaker words for few seeds, none for too few."""
    said = {(a, b): answers.conclusion(signed(a), signed(b)) for a in (-1, 0, 1) for b in (-1, 0, 1)}
    assert said == answers.MEANINGS
    assert len(set(said.values())) == 9
    assert sum(text.count("(") for text in answers.in_short(evidence_of(ALL))) >= 8
    assert answers.conclusion(signed(1, 3), signed(0, 3)).endswith("(3 seeds: too few for a test)")
    assert answers.conclusion(signed(1, 2), signed(1, 2)) == "too few seeds to say anything"
    assert "does not earn" in answers.worth(signed(1), signed(-1), signed(0))
    assert "gains something" in answers.worth(signed(1), signed(0), signed(0))
    assert "or only moves further, is open" in answers.worth(signed(0), signed(1), signed(1))
    assert "not visibly" in answers.worth(signed(0), signed(0), signed(0))


def test_the_answer_follows_the_data():
    """Swap the primary conditions, and every word turns round."""
    evidence = evidence_of(ALL)
    swap = {"fixed": "interpolate", "interpolate": "fixed"}
    turned = [relabelled(r, condition=swap[r.condition]) for r in ALL if r.condition in swap]
    there, back = answers.answer(evidence), answers.answer(evidence_of(turned))
    assert "STEP helped" in there
    assert "The composite metric M is higher by" in there
    assert "STEP hurt" in back
    assert "The composite metric M is lower by" in back
    assert "has not been run" in answers.answer(evidence_of([]))


def test_rivals_in_the_objective_are_named_one_by_one():
    """All conditions without a budget but the baseline; the sign is that of interpolation minus the rival."""
    evidence = evidence_of(ALL)
    (said,) = [a.sentences for a in answers.answers(evidence, forks.Forks([])) if "objective's own" in a.question]
    assert [re.match(r"Interpolation against (.+), shocks", text)[1] for text in said] == [
        "Slow EMA reference",
        "Ratcheted reference, drift cap",
        "Ratcheted reference, no cap",
        "Target-KL stopping",
        "Adaptive KL coefficient",
    ]
    found = evidence.contrast("drift", "shocks", "interpolate", "ratchet")
    assert found.mean < 0
    assert f"the drift from the first policy is lower by {abs(found.mean):.3g}" in said[2]


def test_a_livelock_is_explained_only_by_flat_steps():
    """Rolled back and flat: Adam's step; kept and shorter: a way out; otherwise no explanation."""
    assert "a fresh draw" in mechanisms.explained([1.0, 1.01], [0.9, 1.1])
    assert "way out" in mechanisms.explained([0.7, 0.7], [0.5, 0.5], "the warm start")
    slow = mechanisms.explained([0.95, 0.95], [0.83, 0.83], "the moments that are kept", 0.8)
    assert slow.endswith("the next proposal moves less: a way out, at the price of 80 % of the updates")
    assert "do not explain" in mechanisms.explained([0.5, 0.4], [0.2, 0.2])
    assert "not known" in mechanisms.explained([], [])
    assert "in spite of" in mechanisms.explained([1.0], [1.0], "the warm start")
    said = "\n".join(mechanisms.livelock(evidence_of(ALL)))
    assert "Global gate, high learning rate: up to 16 rejections in a row; 3 of 3 runs ended in such a row" in said
    assert "Global gate, shocks at known updates: no two rejections in a row at one learning rate" in said


def test_shocks_are_judged_against_calm_training():
    """The baseline and the primary condition under shocks, each against the baseline without, paired by seed."""
    said = list(mechanisms.shocks_harm(evidence_of(ALL)))
    assert [text.split(":")[0] for text in said] == [
        "Fixed-reference KL PPO under shocks against Fixed-reference KL PPO without",
        "Interpolation under shocks against Fixed-reference KL PPO without",
    ]
    found = evidence_of(ALL).contrast("drift", "shocks", "fixed", "fixed", "nominal")
    assert f"the drift from the first policy is higher by {found.mean:.3g}" in said[0]
    assert not list(mechanisms.shocks_harm(evidence_of([r for r in ALL if r.arm != "nominal"])))


def test_rivals_that_are_ahead_are_in_the_answer():
    """By mean M; said only if there are any."""
    evidence = evidence_of(ALL)
    means = {name: fmean(evidence.known("shocks", name, "score")) for name in answers.rivals(evidence)}
    ours = fmean(evidence.known("shocks", "interpolate", "score"))
    assert max(means.values()) <= ours
    assert not list(answers.ahead(evidence))
    best = [relabelled(r, result={**r.result, "reward": 2.0}) for r in ALL if r.condition == "ema"]
    (said,) = answers.ahead(evidence_of([r for r in ALL if r.condition != "ema"] + best))
    assert said.startswith("of the objective's own means, Slow EMA reference had a higher mean M")


def test_lost_reward_is_less_movement_or_worse_movement():
    """From what was spent, and what each nat earned."""
    assert "slower, not worse" in mechanisms.less_or_worse((0.1, 0.2), signed(0))
    assert "earned less" in mechanisms.less_or_worse((0.1, 0.2), signed(-1))
    assert "did not go less far" in mechanisms.less_or_worse((0.3, 0.2), signed(1))


def test_branches_are_paired_by_point():
    """Reward relative to theta_t; what is missing is left out; unknown branches come last."""
    made = forks.Forks([*branches(), {**branches()[0], "branch": "carry"}])
    assert made.names[0] == "accept"
    assert made.names[-1] == "carry"
    assert made.contrast("distance_held", "small", "accept").n == 0
    reward = {(b["branch"], b["seed"], b["t"]): b["reward_next"] for b in branches()}
    points = {(b["seed"], b["t"]) for b in branches()}
    oracle = {point: reward[("reject", *point)] - reward[("accept", *point)] for point in points}
    assert made.differences("gain_next", "reject", "accept") == pytest.approx(oracle)
    found = made.contrast("gain_next", "reject", "accept")
    assert found.pairs == (0, 1, 2)
    assert found.differences == pytest.approx(
        [fmean(value for (owner, _), value in oracle.items() if owner == seed) for seed in found.pairs]
    )


# The report


def check_text(text: str) -> None:
    """No figure that is none; tables with as many cells in each row as in their heads."""
    assert not re.findall(r"\b(nan|NaN|None|inf|Infinity)\b", text)
    width = 0
    for line in text.splitlines():
        cells = line.count("|") if line.startswith("|") else 0
        assert not (cells and width) or cells == width, line
        width = cells


def check_pictures(report) -> None:
    """Every picture that is shown is there, and is no empty sheet."""
    shown = re.findall(r"!\[(.+)\]\((\w+\.png)\)", report.read_text())
    assert {name for _, name in shown} == {path.name for path in report.parent.glob("*.png")}
    for title, name in shown:
        pixels = matplotlib.image.imread(report.parent / name)[..., :3]
        assert pixels.shape[1] >= 800, (title, name)
        assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.6, (title, name)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of the whole study."""
    return write(ALL, branches(), tmp_path_factory.mktemp("whole"))


def test_the_report_has_all_its_parts_in_order(report):
    """Activation first, then the answer; every section, condition, arm and setting; no figure that is none."""
    text = report.read_text()
    assert [line for line in text.splitlines() if re.match(r"##? ", line)] == SECTIONS
    lines = [line for line in text.splitlines() if line]
    assert lines[1].startswith("Activation: **ok** (75 runs)")
    assert lines[2].startswith("*In short*: PPO under LoRA")
    assert lines[3].startswith("**Answer.** Interpolation against Fixed-reference KL PPO")
    assert "Every planned run is there." in text
    assert "`make study`" in text
    assert "| `budget_mean` | 0.03 |" in text
    assert "| Logit projection | .2992 ± .0163 | .3525 |" in text
    assert "| 0.0015 (best M) | 3 |" in text
    assert "with 3 seeds" in text
    assert text.count("### ") == 5 + 10
    check_text(text)


def test_the_report_shows_its_pictures(report):
    """All kinds of them."""
    check_pictures(report)
    names = {path.stem for path in report.parent.glob("*.png")}
    assert names == {
        "activation_high_lr",
        "activation_shocks",
        "branches",
        "differences",
        "held_out",
        "learning_rates",
        "outcomes",
    }


def test_the_report_says_what_the_runs_say(report):
    """Figures in the tables, computed another way."""
    text = report.read_text()
    scores = [figures(r, STUDY).score for r in ALL if (r.arm, r.condition) == ("shocks", "breaker")]
    row = next(line for line in text.splitlines() if re.match(r"\| Slice circuit breaker \| 3 \| .* ± ", line))
    assert row.split(" | ")[2] == f"{fmean(scores):.3g} ± {stdev(scores):.2g}"
    evidence = evidence_of(ALL)
    found = evidence.primary["score"]
    assert f"| M ↑ | 9 | {found.mean:.3g} | [{found.low:.3g}, {found.high:.3g}] |" in text
    assert set(evidence.primary) == set(METRICS)


def test_the_summary_is_short(report):
    """One page, with the status, the answer and one picture."""
    text = (report.parent / "summary.md").read_text()
    assert text.startswith("Activation: **ok**")
    assert text.count("![") == 1
    assert len(text) < 6000
    assert text.count("| Interpolation |") == 1
    check_text(text)


def test_runs_that_were_saved_give_the_same_answer(tmp_path):
    """To the digits that are kept."""
    runs = [r for r in ALL if r.arm == "shocks" and r.condition in ("fixed", "interpolate")]
    save_runs(tmp_path / "runs.jsonl.gz", runs)
    again = load_runs(tmp_path / "runs.jsonl.gz")
    assert answers.answer(evidence_of(again)) == answers.answer(evidence_of(runs))
    assert check(again, []).ok


def test_a_failed_check_stands_at_the_top(tmp_path):
    """And the rest is still there to be looked at."""
    runs = [run("shocks", "fixed", 0), relabelled(run("shocks", "fixed", 0), condition="ema")]
    text = write(runs, [], tmp_path).read_text()
    assert text.splitlines()[2].startswith("Activation: **not ok** (2 runs): 1 problem")
    assert "- IDENTICAL: shocks/fixed and shocks/ema" in text
    check_text(text)


PARTIAL = {
    "nothing": ([], []),
    "one run": ([("shocks", "fixed", 0)], []),
    "no baseline": ([("shocks", "interpolate", 0), ("shocks", "gate", 1)], [("accept",)]),
    "two seeds": ([("shocks", c, s) for c in ("fixed", "interpolate") for s in (0, 1)], [("accept", "shrink")]),
    "other seeds": ([("shocks", "fixed", 0), ("shocks", "interpolate", 1)], [("reject_keep",)]),
    "a grid alone": ([("low_lr", "fixed", 0), ("nominal", "fixed", 1)], []),
    "stuck alone": ([("high_lr", "gate", 0)], []),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_an_unfinished_study_gives_a_report_of_what_there_is(name, tmp_path):
    """Any part of the plan, and what is missing from it."""
    keys, groups = PARTIAL[name]
    kept = [b for group in groups for b in branches([(0, 3)]) if b["branch"] in group]
    report = write([run(*key) for key in keys], kept, tmp_path)
    text = report.read_text()
    assert [line for line in text.splitlines() if re.match(r"##? ", line)] == SECTIONS
    assert "**Missing: " in text
    assert f"Unfinished: {len(ALL) - len(keys)} planned runs missing" in text
    assert "Some of these are of the primary contrast" in text
    check_text(text)
    check_text((tmp_path / "summary.md").read_text())
    check_pictures(report)


def test_names_that_the_config_file_does_not_have_are_shown_as_they_are(tmp_path):
    """An arm, a condition and a branch of one's own; a run beyond the plan; other settings."""
    mine = [
        replace(run("nominal", "fixed", seed), arm="mine", condition=condition)
        for seed, condition in ((0, "fixed"), (1, "other"))
    ]
    strange = [b | {"branch": "half_way"} for b in branches() if b["branch"] == "shrink"]
    study = replace(STUDY, budget_mean=0.5)
    report = write(mine, strange, tmp_path, study=study, plan=[Batch("mine", ("fixed",), (0,))])
    text = report.read_text()
    assert "### Mine" in text
    assert "| half way |" in text
    assert "| `budget_mean` | 0.5 |" in text
    assert "Every planned run is there." in text
    check_text(text)


def test_candidates_that_are_not_finite_do_no_harm(tmp_path):
    """An update that broke and was rejected: no place in a picture, no NaN in a table."""
    made = run("shocks", "gate", 0)
    broken = replace(
        made.records[5],
        action=Action.REJECT,
        candidate=Movement(math.nan, dict.fromkeys(made.records[5].candidate.slices, math.nan)),
        accepted=made.records[5].candidate.still(),
        triggered=True,
        alpha=0.0,
    )
    records = (*made.records[:5], broken, *made.records[6:])
    report = write([replace(made, records=records), run("shocks", "fixed", 0)], [], tmp_path)
    check_text(report.read_text())
    check_pictures(report)
