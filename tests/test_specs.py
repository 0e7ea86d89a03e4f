import pytest

from diffusion import specs


def linear(x, slope=1.0, steps=10, exact=False, kind="a"):
    return x * slope + steps


def double(base, factor):
    return base * factor


def seven(offset=0):
    return 7 + offset


FUNCTIONS = {"linear": linear, "double": double, "seven": seven}


def test_name_alone_is_the_function():
    assert specs.function("linear", FUNCTIONS, "f") is linear


def test_options_are_filled_in():
    assert specs.function("linear(slope=3, steps=2)", FUNCTIONS, "f")(5) == 17


def test_context_fills_what_is_not_given():
    context = {"slope": 4.0, "other": 1}
    assert specs.function("linear", FUNCTIONS, "f", context)(1) == 14
    assert specs.function("linear(slope=2.0)", FUNCTIONS, "f", context)(1) == 12


def test_values_nest():
    assert specs.value("double(seven(offset=1), 2)", FUNCTIONS, "f") == 16
    assert specs.value("double(factor=3, base=seven)", FUNCTIONS, "f") == 21


@pytest.mark.parametrize(
    "text, message",
    [
        ("liner", r"field: unknown 'liner'; choose one of double, linear, seven. Did you mean 'l"),
        ("linear(slop=1)", "linear has no option 'slop'; its options: slope, steps, exact, kind"),
        ("linear(slope='a')", r"slope='a'\) has the wrong type; expected float"),
        ("linear(steps=1.5)", "expected int"),
        ("linear(exact=1)", "expected bool"),
        ("linear(kind=2)", "expected str"),
        ("linear(2.0)", "options need names"),
        ("linear(slope=", "expected a name or"),
        ("3 + 4", "expected a name or"),
        ("os.system('x')", "expected a name or"),
        ("linear(slope=unheard(1))", "unknown 'unheard'"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        specs.function(text, FUNCTIONS, "field")


def test_what_the_caller_fills_in_is_no_option():
    assert specs.function("double(factor=3)", FUNCTIONS, "f", filled=["base"])(base=2) == 6
    with pytest.raises(ValueError, match="double has no option 'base'; its options: factor"):
        specs.function("double(base=3)", FUNCTIONS, "f", filled=["base"])
    with pytest.raises(ValueError, match=r"double needs factor, as in double\(factor=...\)"):
        specs.function("double", FUNCTIONS, "f", filled=["base"])


def test_missing_argument_is_named():
    with pytest.raises(ValueError, match="missing a required argument: 'factor'"):
        specs.value("double(seven)", FUNCTIONS, "field")
