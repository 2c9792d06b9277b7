"""Fences: what may import what, and how long a function may get."""

import ast
import functools
import re
import runpy
import sys
from itertools import chain
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "asyncrl"

LAYERS = (
    {
        *(
            "affinity",
            "bounded",
            "collector",
            "container",
            "decoders",
            "errors",
            "event_loop",
            "lifeline",
            "packages",
            "paths",
            "rendezvous",
            "resolve",
            "roles",
            "scratch",
            "section",
            "specs",
            "states",
        ),
        *("trace", "units", "waits", "work"),
    },
    {"core", "objective"},
    {"config"},
    {"weights", "data", "tiny"},
    {"reward"},
    {"curriculum"},
    {"rollout"},
    {"trainer", "observe"},
    {"wire"},
    {"runfiles"},
    {"report"},
    {"liveness", "reward_models", "episode_guests", "transfer"},
    {"loop"},
    {"evaluation"},
    {"cluster"},
    {"plan"},
    {"launch"},
    {"sweep"},
    {"cli"},
)
"""Rooms of the package from the ground up. A room imports from its own floor only itself."""

PURE = {"core", "objective"}
PURE_IMPORTS = {*sys.stdlib_module_names, "numpy", "torch", "asyncrl"}

LONGEST_FUNCTION = 80
LONGEST_NARROW_PATH = 11_500


@functools.cache
def trees():
    """All modules, parsed; not while tests are collected, which every worker of pytest-xdist does."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.is_relative_to(PACKAGE / "configs"):
            continue  # what a user copies
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts).removesuffix("__init__").rstrip(".")
        found[name] = ast.parse(path.read_text())
    return found


@functools.cache
def walked(tree):
    return [*ast.walk(tree)]


def imported(tree):
    """Full names of all modules that are imported anywhere in a file, for types too."""
    for node in walked(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("asyncrl.") in trees() and inner.startswith("asyncrl")
                yield inner if is_module else node.module


@functools.cache
def own_imports(name):
    own = (full.removeprefix("asyncrl").lstrip(".") for full in imported(trees()[name]) if is_own(full))
    return {module for module in own if module != name}


@pytest.fixture(autouse=True, scope="module")
def _forgotten():
    """A million objects, at which the garbage collector would look again and again."""
    yield
    for made in (trees, walked, own_imports):
        made.cache_clear()


def is_own(full):
    return full.partition(".")[0] == "asyncrl"


def room(name):
    return name.partition(".")[0]


def floor(name):
    return next(i for i, rooms in enumerate(LAYERS) if room(name) in rooms)


def test_every_room_is_on_a_floor():
    assert {room(name) for name in trees()} - {""} == set(chain.from_iterable(LAYERS))


def test_imports_point_downward():
    """And never across: rooms of one floor know nothing of each other, but for what everything stands on."""
    wrong = [
        f"{name} imports {other}"
        for name in trees()
        for other in own_imports(name) - {""}
        if name and room(name) != room(other)
        if floor(other) > floor(name) or floor(other) == floor(name) > 2
    ]
    assert not wrong


def test_the_front_door_is_for_users():
    assert not [name for name in trees() if "" in own_imports(name) and room(name) != "cli"]


def test_the_pure_rooms_import_nothing_but_python_numpy_and_torch():
    pure = [name for name in trees() if room(name) in PURE]
    assert {full.partition(".")[0] for name in pure for full in imported(trees()[name])} <= PURE_IMPORTS
    assert {room(other) for name in pure for other in own_imports(name)} <= PURE | LAYERS[0]


def cycles():
    """Sets of modules that reach each other."""
    reached = {name: own_imports(name) for name in trees()}
    while True:
        more = {name: set().union(others, *(reached[o] for o in others)) for name, others in reached.items()}
        if more == reached:
            break
        reached = more
    around = {name: {o for o in others if name in reached[o]} for name, others in reached.items()}
    return sorted({frozenset(found) for found in around.values() if found}, key=sorted)


def test_there_is_no_import_cycle():
    assert cycles() == []


def names_in(folder):
    return [path.parent.name for path in (PACKAGE / folder).glob("*/spec.py")]


def naming(section, key, folder):
    """What a string looks like that names one of a folder, or a section or setting of it."""
    names = "|".join(names_in(folder))
    return rf"^({names})$|\b{section}\.({key}=)?({names})\b"


NAMES = {
    "backend": ("trainer.backends", naming("trainer", "backend", "trainer/backends")),
    "engine": ("rollout.engines", naming("rollout", "engine", "rollout/engines")),
    "mode": ("config.run", r"^inline$"),
}
"""Of settings that choose one of several things: the only place where it may be asked which, and what a
string that names one looks like. Elsewhere its spec, or a property, is asked for what matters of it."""
NAMED = {
    "backend": ("config.trainer", "config.rollout", "packages", "rollout.engines"),
    "engine": ("config.rollout", "config.trainer", "packages", "trainer.backends"),
    "mode": ("loop.inline",),
}
"""Where else strings may look so: defaults, packages of these names, and what one of them is the subject
of."""


def test_what_is_chosen_is_not_asked_for_by_name():
    wrong = [
        f"{name}:{node.lineno} names a {key}"
        for key, (place, pattern) in NAMES.items()
        for name, tree in trees().items()
        if not name.startswith(place)
        for node in (*asked(tree, key), *(() if name.startswith(NAMED[key]) else named(tree, pattern)))
    ]
    assert not wrong


def test_engines_are_known_by_their_specs_alone():
    """But for what the embedded one tells of every model: how it decodes."""
    inner = tuple(f"rollout.engines.{name}" for name in names_in("rollout/engines"))
    wrong = {name for name in trees() for other in own_imports(name) if other.startswith(inner)}
    assert {name for name in wrong if not name.startswith("rollout.engines.")} == {"plan.facts.model"}


def test_adapters_are_imported_where_a_config_names_them_alone():
    adapters = "rollout.adapters."
    outside = [name for name in trees() if not name.startswith(adapters)]
    assert not [name for name in outside for other in own_imports(name) if other.startswith(adapters)]


def asked(tree, attribute):
    """Comparisons with an attribute of this name, and what is looked up by it."""
    for node in walked(tree):
        if isinstance(node, ast.Compare | ast.Match | ast.Subscript):
            inner = node.slice if isinstance(node, ast.Subscript) else node
            subject = inner.subject if isinstance(inner, ast.Match) else inner
            if any(isinstance(n, ast.Attribute) and n.attr == attribute for n in ast.walk(subject)):
                yield node


def named(tree, pattern):
    """Strings that look so; docstrings may, those of attributes included."""
    told = {id(node.value) for node in walked(tree) if isinstance(node, ast.Expr)}
    for node in walked(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told
        if is_text and re.search(pattern, node.value):
            yield node


def functions():
    for name, tree in trees().items():
        for node in walked(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node.end_lineno - node.lineno + 1


def test_the_algorithm_is_on_one_screen():
    assert len((PACKAGE / "loop" / "algorithm.py").read_text().splitlines()) < 100


def test_no_function_is_too_long():
    assert {name for name, lines in functions() if lines > LONGEST_FUNCTION} == set()


def defined_twice():
    """Functions and classes of which one of the same name, in the same place, wins. (A property's setter has
    decorators.)"""
    for name, tree in trees().items():
        for place in walked(tree):
            if isinstance(place, ast.Module | ast.ClassDef):
                kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
                defined = [n.name for n in place.body if isinstance(n, kinds) and not n.decorator_list]
                yield from (f"{name}.{each}" for each in set(defined) if defined.count(each) > 1)


def test_nothing_is_defined_twice():
    """As a merge may have it. (A linter lets names that begin with `_` pass.)"""
    assert set(defined_twice()) == set()


def test_the_narrow_path_is_short_and_the_readme_tells_its_length():
    root = PACKAGE.parent
    lines = runpy.run_path(str(root / "benchmarks" / "house.py"))["narrow_path"]()
    assert lines < LONGEST_NARROW_PATH
    told = re.search(r"the torch trainer work has ([\d,]+) lines", (root / "README.md").read_text())
    assert abs(int(told[1].replace(",", "")) - lines) < 0.05 * lines


ROLE_NAME = re.compile("(coordinator|trainer|rollout)(-[0-9]*)?|reward-[0-9]*")


def role_names(tree):
    """Texts, but for keys (of settings), that name a role."""
    keys = {id(key) for node in walked(tree) if isinstance(node, ast.Dict) for key in node.keys}
    keys |= {id(node.slice) for node in walked(tree) if isinstance(node, ast.Subscript)}
    constants = (node for node in walked(tree) if isinstance(node, ast.Constant) and id(node) not in keys)
    texts = (node.value for node in constants if isinstance(node.value, str))
    return [text for text in texts if ROLE_NAME.fullmatch(text)]


def test_roles_are_named_in_one_place():
    elsewhere = (name for name in trees() if room(name) not in ("roles", "cluster"))
    assert {name: found for name in elsewhere if (found := role_names(trees()[name]))} == {}
