"""One case that cannot be used must not take the others with it, and must not be forgotten."""

import logging

import pytest
import torch
from ignite.engine import Events
from monai.data import MetaTensor
from monai.transforms import Compose, Lambda
from torch import nn
from torch.utils.data import DataLoader

from scripts.data.placing import ImagePrompts
from scripts.engines.batches import PrepareCase, only_case
from scripts.engines.evaluators import FAILURE, CaseEvaluator, TolerantDataset, intended_error
from scripts.errors import InputError, OutputError, PromptError


def refuse_some(case):
    """A transform that refuses the cases called bad, and breaks over those called broken."""
    if case["case"].startswith("bad"):
        raise InputError(f"{case['case']} has no contrast")
    if case["case"].startswith("broken"):
        raise KeyError(case["case"])
    return case


def evaluator_of(cases, *, postprocessing=None, inferer=None, **settings):
    """An evaluator whose network gives the image back as the prediction."""
    dataset = TolerantDataset(cases, Compose([Lambda(refuse_some)]))
    return CaseEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(dataset, batch_size=1, collate_fn=only_case),
        network=nn.Identity(),
        prepare_batch=PrepareCase(),
        inferer=inferer or (lambda image, network, **_: network(image)),
        postprocessing=postprocessing,
        **settings,
    )


@pytest.fixture
def three_cases(make_case):
    return [make_case("first"), make_case("bad one"), make_case("last")]


def test_a_case_that_can_be_used_is_given_as_it_is(make_case):
    case = make_case()
    assert TolerantDataset([case], Compose([]))[0] is case


def test_instead_of_a_case_that_cannot_be_used_comes_the_reason(three_cases):
    dataset = TolerantDataset(three_cases, Compose([Lambda(refuse_some)]))
    assert dataset[1] == {"case": "bad one", FAILURE: "bad one has no contrast"}
    assert dataset[2]["case"] == "last"


def test_a_defect_is_no_reason(make_case):
    dataset = TolerantDataset([make_case("broken")], Compose([Lambda(refuse_some)]))
    with pytest.raises(RuntimeError, match="applying transform"):
        dataset[0]


def raised(*errors):
    """Raise the last error because of the one before it, and so on."""
    try:
        if len(errors) > 1:
            try:
                raise raised(*errors[:-1])
            except Exception as cause:
                raise errors[-1] from cause
        raise errors[0]
    except Exception as error:
        return error


def test_the_intended_error_is_found_behind_others():
    reason = PromptError("no such class")
    assert intended_error(reason) is reason
    assert intended_error(raised(reason, RuntimeError("applying transform"), RuntimeError("in a config"))) is reason
    # The one nearest to the surface, which is the one that was meant last.
    assert intended_error(raised(InputError("inner"), reason)) is reason


def test_the_intended_error_is_found_where_another_came_up_in_its_place():
    reason = OutputError("the disk is full")

    def fail_twice():
        try:
            raise reason
        finally:
            raise RuntimeError("while cleaning up")

    with pytest.raises(RuntimeError) as caught:
        fail_twice()
    assert intended_error(caught.value) is reason


def test_there_is_no_intended_error_behind_a_defect():
    assert intended_error(raised(KeyError("x"), RuntimeError("applying transform"))) is None
    assert intended_error(None) is None


def test_the_cases_around_a_bad_one_are_segmented(three_cases, caplog):
    seen = []

    def note(data):
        seen.append(data)
        return data

    evaluator = evaluator_of(three_cases, postprocessing=note)
    with caplog.at_level(logging.ERROR, "scripts"):
        evaluator.run()
    assert [data["case"] for data in seen] == ["first", "last"]
    assert evaluator.failures == {"bad one": "bad one has no contrast"}
    assert caplog.messages == ["bad one has no contrast"]
    with pytest.raises(InputError, match=r"^1 of 3 cases failed: bad one \(bad one has no contrast\)$"):
        evaluator.raise_failures()


def test_a_case_whose_result_fits_nowhere_leaves_the_others_alone(make_case):
    """Refused after the network, as by a DICOM series on whose slices no label map can be laid."""
    kept, scored = [], []

    def keep(data):
        if data["case"] == "odd":
            raise InputError("odd: the slices lie elsewhere")
        kept.append(data["case"])
        return data

    evaluator = evaluator_of([make_case(name) for name in ("first", "odd", "last")], postprocessing=Compose([keep]))
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: scored.append(len(engine.state.output)))
    evaluator.run()
    assert kept == ["first", "last"]
    assert scored == [1, 0, 1]
    with pytest.raises(InputError, match=r"^1 of 3 cases failed: odd \(odd: the slices lie elsewhere\)$"):
        evaluator.raise_failures()


@pytest.mark.parametrize("error", [OutputError("the disk is full"), KeyError("pred")])
def test_what_is_no_fault_of_the_case_ends_the_run(make_case, error):
    def fail(data):
        raise error

    evaluator = evaluator_of([make_case(), make_case("b")], postprocessing=Compose([fail]))
    with pytest.raises((RuntimeError, OutputError), match=r"disk is full|applying transform"):
        evaluator.run()
    assert evaluator.failures == {}


def test_every_failure_is_named(make_case):
    evaluator = evaluator_of([make_case(name) for name in ("bad one", "good", "bad two")])
    evaluator.run()
    with pytest.raises(InputError, match=r"2 of 3 cases failed: bad one \(.*\); bad two \(.*\)"):
        evaluator.raise_failures()


def test_without_failures_nothing_is_raised(make_case):
    evaluator = evaluator_of([make_case()])
    evaluator.run()
    evaluator.raise_failures()


def test_where_no_case_can_be_used_the_run_ends_with_the_reasons_and_not_with_the_metrics(make_case):
    class Scores:
        def attach(self, engine, name):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.fail)

        def fail(self):
            pytest.fail("there was nothing to score")

    cases = [make_case("bad one"), make_case("bad two")]
    evaluator = evaluator_of(cases, key_val_metric={"score": Scores()})
    with pytest.raises(InputError, match="2 of 2 cases failed"):
        evaluator.run()


def test_a_defect_ends_the_run(make_case):
    evaluator = evaluator_of([make_case("broken"), make_case()])
    with pytest.raises(RuntimeError, match="applying transform"):
        evaluator.run()


def test_postprocessing_gets_the_case_whole_and_the_prediction_without_batch_axis(make_case):
    case = make_case() | {"nothing": None, "classes": ["liver", "spleen"]}
    seen = []

    def note(data):
        seen.append(dict(data))
        return {**data, "pred": data["pred"] > 100, "extra": 1}

    evaluator = evaluator_of([case], postprocessing=note, inferer=lambda image, network, **_: image + 1)
    evaluator.run()
    assert seen[0]["image"] is case["image"]
    assert isinstance(seen[0]["image"], MetaTensor)
    assert seen[0]["label"] is case["label"]
    assert (seen[0]["nothing"], seen[0]["classes"]) == (None, ["liver", "spleen"])
    assert torch.equal(seen[0]["pred"], case["image"].as_tensor() + 1)
    (output,) = evaluator.state.output
    assert set(output) == {"pred", "extra"}
    assert output["pred"].dtype == torch.bool
    assert evaluator.state.batch[0]["case"] == "a"


def test_the_inferer_is_told_what_the_case_asks_for(make_case):
    told = []

    def note(image, network, **arguments):
        told.append((tuple(image.shape), image.meta["prompts"].class_ids, arguments))
        return image

    cases = [make_case(), make_case("b")]
    for case, asked in zip(cases, [(1, 2), (9,)], strict=True):
        case["image"].meta["prompts"] = ImagePrompts(asked)
    evaluator_of(cases, inferer=note).run()
    assert told == [((1, 1, 12, 16, 4), (1, 2), {"case": "a"}), ((1, 1, 12, 16, 4), (9,), {"case": "b"})]


def test_segmenting_needs_no_label_and_leaves_no_gradient(make_case):
    case = make_case()
    del case["label"]
    evaluator = evaluator_of([case], inferer=lambda image, network, **_: image * network.weight)
    evaluator.network = nn.PReLU().train()
    evaluator.run()
    assert not evaluator.state.output[0]["pred"].requires_grad
    assert evaluator.network.training  # as it was before


def test_an_evaluator_can_run_again(three_cases):
    evaluator = evaluator_of(three_cases)
    evaluator.run(1)
    evaluator.run(2)
    assert evaluator.state.epoch == 2
    assert list(evaluator.failures) == ["bad one"]
