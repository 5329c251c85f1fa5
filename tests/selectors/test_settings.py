"""Settings as people write them: wrong types are named, whatever the class looks at itself."""

from dataclasses import dataclass

import pytest

from curate.pipeline.manifests.schedules import make_schedule
from curate.selectors.registry import make_selector
from curate.selectors.settings import made


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("ccs", {"strata": "x"}, "method 'ccs': strata must be a whole number, not 'x'"),
        ("ccs", {"strata": 2.5}, "strata must be a whole number, not 2.5"),
        ("ccs", {"strata": True}, "strata must be a whole number, not True"),
        ("importance", {"replacement": "nope"}, "replacement must be true or false, not 'nope'"),
        ("importance", {"unbiased": 1}, "unbiased must be true or false, not 1"),
        ("threshold", {"at_least": "x"}, "at_least must be a number, not 'x'"),
        ("top", {"drop_top": "x"}, "drop_top must be a number, not 'x'"),
        ("top", {"by": 3}, "by must be a text, not 3"),
    ],
)
def test_a_selector_names_the_setting_of_a_wrong_type(method, settings, says):
    with pytest.raises(ValueError, match=says):
        make_selector(method, **{"by": "score", **settings})


def test_whole_numbers_are_numbers_and_a_missing_setting_is_named():
    assert make_selector("softmax", by="score", tau=1).tau == 1
    assert make_selector("top", by="score", drop_top=3).drop_top == 3
    with pytest.raises(ValueError, match=r"method 'top' needs by: give --param by=VALUE$"):
        make_selector("top")
    said = r"'gsr' needs label and group: give --param label=VALUE --param group=VALUE$"
    with pytest.raises(ValueError, match=said):
        make_selector("gsr")


@pytest.mark.parametrize(
    ("rule", "params"),
    [
        ("rs2", {"fraction": "x"}),
        ("curriculum", {"start": "x"}),
        ("cooldown", {"temperature": "x", "groups": ("a",), "rows": (1,)}),
    ],
)
def test_a_schedule_names_the_parameter_of_a_wrong_type(rule, params):
    name = next(iter(params))
    with pytest.raises(ValueError, match=f"schedule '{rule}': {name} must be a number, not 'x'"):
        make_schedule(rule, epochs=3, params=params)


def test_an_error_of_the_class_that_no_type_explains_is_passed_on():
    @dataclass
    class Odd:
        size: int

        def __post_init__(self) -> None:
            raise TypeError("sizes cannot be odd")

    with pytest.raises(ValueError, match="odd one: sizes cannot be odd"):
        made("odd one", Odd, {"size": 1})
