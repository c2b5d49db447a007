"""Errors state the argument, the value, what is allowed and what to do; subclasses can be caught separately."""

import pickle

import pytest

import resnet_paths
from resnet_paths._utils.errors import (
    MissingExtraError,
    ResnetPathsError,
    StoreError,
    StudyInterrupted,
    UnravelError,
    nearest_names,
    requires_extra,
)


def test_message_names_argument_value_allowed_and_advice():
    error = ResnetPathsError("length", 12, "an int from 0 to 9", "Count again.")
    assert str(error) == "length: got 12; allowed: an int from 0 to 9. Count again."
    assert (error.argument, error.value, error.allowed, error.advice) == (
        "length",
        12,
        "an int from 0 to 9",
        "Count again.",
    )


@pytest.mark.parametrize("allowed", ["an int", "an int."])
def test_message_without_advice_ends_with_one_full_stop(allowed):
    assert str(ResnetPathsError("x", None, allowed)) == "x: got None; allowed: an int."


def test_a_value_that_cannot_be_shown_is_no_other_error():
    assert "length: got <int: Exceeds the limit (4300 digits)" in str(ResnetPathsError("length", 10**5_000, "an int"))


def test_text_is_shown_quoted():
    assert "got 'a b'" in str(ResnetPathsError("x", "a b", "y"))


@pytest.mark.parametrize(("length", "shown"), [(198, 200), (199, 203), (10_000, 203)])
def test_long_values_are_shortened_in_the_message_only(length, shown):
    value = "v" * length  # its repr is two characters longer
    error = ResnetPathsError("x", value, "something short")
    assert len(str(error)) == len("x: got ; allowed: something short.") + shown
    assert error.value == value


def test_is_a_value_error_and_public():
    assert issubclass(ResnetPathsError, ValueError)
    assert resnet_paths.ResnetPathsError is ResnetPathsError


@pytest.mark.parametrize("kind", [UnravelError, StoreError, StudyInterrupted])
def test_subclasses_are_caught_by_the_base_and_apart(kind):
    assert issubclass(kind, ResnetPathsError)
    assert getattr(resnet_paths, kind.__name__) is kind
    assert not any(issubclass(kind, other) for other in {UnravelError, StoreError, StudyInterrupted} - {kind})


def test_an_interrupted_study_is_an_interrupt_with_its_rows():
    error = StudyInterrupted("the rows", 3, "a folder")
    assert isinstance(error, KeyboardInterrupt)
    assert (error.frame, error.num_batches, error.store) == ("the rows", 3, "a folder")
    assert str(error).startswith("stopped after 3 batches. The rows")
    assert str(error).endswith("Run the same study again to resume from 'a folder'.")
    assert str(StudyInterrupted(None, 0)) == "stopped after 0 batches."


ERRORS = [
    ResnetPathsError("block", [1, 2], "an index", "Count from 0."),
    UnravelError("model", "add", "a chain"),
    StoreError("store", "/a", "a folder"),
    StudyInterrupted([1], 2, "/a"),
    StudyInterrupted(None, 0),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_fields_and_message(protocol, error):
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert vars(again) == vars(error)
    assert str(again) == str(error)


def test_nearest_names_puts_the_nearest_first():
    known = ["layer1.0", "layer1.1", "layer2.0", "head"]
    assert nearest_names("layer2.O", known).startswith("'layer2.0'")
    assert nearest_names("layer1.1", known, most=1) == "'layer1.1'"


def test_nearest_names_falls_back_to_the_first_known():
    assert nearest_names("zzz", ["a", "b", "c", "d"]) == "'a', 'b', 'c'"
    assert nearest_names("zzz", ["a", "b", "c", "d"], most=1) == "'a'"
    assert nearest_names("zzz", []) == ""


def test_nearest_names_leaves_out_what_is_not_alike():
    assert nearest_names("plain-21", ["plain-20", "xyz"]) == "'plain-20'"
    assert nearest_names("plain-21", ["plain-20", "xyz"], cutoff=0) == "'plain-20', 'xyz'"


def test_nearest_names_takes_an_iterator_and_any_object():
    assert nearest_names(2, iter(["1", "2"])) == "'2'"


def test_a_missing_module_names_its_extra():
    message = r"'not_there'.*not installed.*pip install 'resnet_paths\[train\]'"
    with pytest.raises(MissingExtraError, match=message), requires_extra("train"):
        import not_there  # noqa: F401
    with pytest.raises(ImportError, match="nothing"), requires_extra("train"):
        from torch import nothing  # noqa: F401
