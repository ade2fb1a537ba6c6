"""The zoo itself, on default attention: its models run, mask what they say, and notice errors."""

from __future__ import annotations

import pytest
import torch
from zoo import CASES, RUN_IDS, RUNS, Case, Layout
from zoo.budget import budget, error
from zoo.watch import Log, first_keys, key_lost_in, replaced, watched, without_mask

pytestmark = pytest.mark.slow

# A wrong attention call must move the output by this many times what a parity test allows.
SENSITIVITY = 10

PADDED: tuple[Layout, ...] = ("right", "left", "ragged", "gap")
PADDED_RUNS = [(case, layout) for case, layout in RUNS if layout in PADDED and case.pads]

every_run = pytest.mark.parametrize(("case", "layout"), RUNS, ids=RUN_IDS)
every_padded_run = pytest.mark.parametrize(
    ("case", "layout"), PADDED_RUNS, ids=[f"{case.name}-{layout}" for case, layout in PADDED_RUNS]
)


def watch(case: Case, layout: Layout) -> tuple[torch.Tensor, Log]:
    with watched() as log:
        output = case.run(case.build(), layout)
    return output, log


@every_run
def test_runs_and_is_deterministic(case: Case, layout: Layout) -> None:
    output, log = watch(case, layout)
    assert log.calls or case.unreached
    assert torch.isfinite(output).all()
    assert torch.equal(output, case.run(case.build(), layout))
    if layout in PADDED:
        assert log.hides or log.biased or case.unreached


@every_padded_run
def test_content_of_padded_tokens_never_reaches_the_output(case: Case, layout: Layout) -> None:
    model = case.build()
    assert torch.equal(case.run(model, layout, pads=3.0), case.run(model, layout))


@every_run
def test_output_changes_when_masks_are_dropped(case: Case, layout: Layout) -> None:
    output, log = watch(case, layout)
    with replaced(without_mask):
        wrong = case.run(case.build(), layout)
    allowed = budget(output, case.exact(layout))
    if log.hides:
        assert error(wrong, output) > SENSITIVITY * allowed
    elif not log.biased:
        assert error(wrong, output) <= allowed


@every_run
def test_output_changes_when_the_first_keys_are_taken(case: Case, layout: Layout) -> None:
    output, log = watch(case, layout)
    with replaced(first_keys):
        wrong = case.run(case.build(), layout)
    allowed = budget(output, case.exact(layout))
    if log.misplaced:
        assert error(wrong, output) > SENSITIVITY * allowed
    elif not log.biased:  # padding is on the right, or absent: the first keys are right
        assert error(wrong, output) <= allowed


@every_run
def test_output_changes_when_any_single_call_loses_a_key(case: Case, layout: Layout) -> None:
    output, log = watch(case, layout)
    model = case.build()
    allowed = budget(output, case.exact(layout))
    unseen = []
    for index, call in enumerate(log.calls):
        with replaced(key_lost_in(index)):
            wrong = case.run(model, layout)
        if error(wrong, output) <= SENSITIVITY * allowed:
            unseen.append((index, call))
    assert len(unseen) <= case.outside, unseen  # calls outside of processors are not switched


def test_every_kind_of_mask_occurs() -> None:
    calls = [call for case, layout in RUNS for call in watch(case, layout)[1].calls]
    assert any(call.mask is None for call in calls)
    assert any(call.mask is not None and not call.hides for call in calls), "all-true mask"
    assert any(call.hides and call.leading and not call.per_query for call in calls), "right"
    assert any(not call.leading and not call.per_query for call in calls), "gap or left"
    assert any(call.per_query for call in calls), "query-dependent"
    assert any(call.hides and "float" in str(call.mask) for call in calls), "additive"
    assert any(call.q[2] != call.k[2] for call in calls), "cross attention"


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
