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
        ("linear(2.0, 1, True, 'b', 3)", "too many arguments; the options of linear: slope, steps"),
        ("linear(2.0, slope=3.0)", "linear is given slope twice"),
        ("linear(slope=1.0, slope=2.0)", "linear is given slope twice"),
        (5000 * "-" + "1", "expected a name or"),
        ("linear(" + 5000 * "-" + "1)", "expected a name or"),
        ("linear(" + 30 * "(" + "1" + 30 * ")" + ")", "expected a name or"),
        ("linear(slope=" + 200_000 * "1" + ")", "expected a name or"),
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


def test_arguments_by_position():
    """Of what the caller fills in, and of what has no default, there is none in the text."""
    assert specs.function("linear(3, 2)", FUNCTIONS, "f")(5) == 17
    assert specs.function("linear(3, steps=2)", FUNCTIONS, "f", {"slope": 9.0})(5) == 17
    assert specs.function("double(3)", FUNCTIONS, "f", filled=["base"])(base=2) == 6
    with pytest.raises(ValueError, match="too many arguments; the options of double: factor"):
        specs.function("double(3, 4)", FUNCTIONS, "f", filled=["base"])


def test_several():
    for given in ("seven, seven(1)", ("seven", "seven(offset=1)"), ["seven()", "seven(1)"]):
        assert specs.values(given, FUNCTIONS, "f") == (7, 8)
    assert specs.values("double(seven, 2)", FUNCTIONS, "f") == (14,)
    assert specs.values("", FUNCTIONS, "f") == specs.values((), FUNCTIONS, "f") == ()
    for given in (3.0, (3.0,), None):
        with pytest.raises(ValueError, match=r"^f=.*: expected texts such as 'linear\("):
            specs.values(given, FUNCTIONS, "f")
    with pytest.raises(ValueError, match="f: unknown 'eight'"):
        specs.values("seven, eight", FUNCTIONS, "f")


def test_nested_names_may_be_others():
    inner = {"one": lambda: 1}
    assert specs.value("double(one, factor=2)", FUNCTIONS, "f", inner) == 2
    with pytest.raises(ValueError, match="unknown 'seven'; choose one of one"):
        specs.value("double(seven, 2)", FUNCTIONS, "f", inner)


@pytest.mark.parametrize("deep", [1500, 5000])  # Python reads the first, and cannot write it
@pytest.mark.parametrize("before, after", [("", ".a"), ("not ", ""), ("", "+1"), ("-", "")])
def test_texts_that_are_too_deep_for_python(deep, before, after):
    text = deep * before + "a" + deep * after
    for given in (text, f"seven({text}), seven", f"seven, {text}"):
        with pytest.raises(ValueError, match=r"^f: expected a name or name\(option=value\)"):
            specs.values(given, FUNCTIONS, "f")


def test_infinity_is_a_number():
    assert specs.value("double(inf, 1)", FUNCTIONS, "f") == float("inf")


def annotated(base: str, size: int = 3, low: float | None = None, path: tuple[float, ...] = ()):
    return base, size, low, path


@pytest.mark.parametrize(
    "options, kind",
    [
        ("base=3", "str"),
        ("base='a', size=2.0", "int"),
        ("base='a', size=True", "int"),
        ("base='a', low='x'", r"float \| None"),
        ("base='a', path=3", "tuple"),
        ("base='a', path='ab'", "tuple"),
        ("base='a', path=(1, None)", "tuple"),
        ("base='a', path=(True,)", "tuple"),
    ],
)
def test_types_are_those_of_the_annotations(options, kind):
    for read in (specs.value, specs.function):
        with pytest.raises(ValueError, match=f"f: annotated.* has the wrong type; expected {kind}"):
            read(f"annotated({options})", {"annotated": annotated}, "f")


def test_types_that_fit():
    made = specs.value("annotated('a', low=2, path=[1, 2.5])", {"annotated": annotated}, "f")
    assert made == ("a", 3, 2, [1, 2.5])
    assert specs.value("annotated('a', low=None)", {"annotated": annotated}, "f")[2] is None


@pytest.mark.parametrize("number", ["1e300", "-1e31", "1e-300", "9999999999", "-(2**31)"])
def test_numbers_that_the_device_does_not_hold(number):
    for text in (f"linear(slope={number})", f"double(({number}, 1), 2)"):
        with pytest.raises(ValueError, match=r"^f: "):
            specs.value(text, FUNCTIONS, "f")
