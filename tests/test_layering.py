"""The house stands: nothing imports upwards, the mathematics knows no Ray, files stay readable, everything is said."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.rllib.algorithms.cql.cql import CQL

import rllib_calql

PACKAGE = "rllib_calql"
ROOT = Path(rllib_calql.__file__).parent
MAX_LINES = 450

# The wings (folders) from the ground up. A module may import from its own wing and from the rows above it only.
WINGS = (
    ("system", "policy"),
    ("common",),
    ("environments",),
    ("checkpoints", "networks", "datasets.decoding", "datasets.episodes"),
    ("datasets.generated", "datasets.report", "datasets.rows"),
    ("datasets.readers.robotics",),
    ("datasets.readers",),
    ("datasets.writers",),
    ("datasets",),
    ("store", "settings", "export"),
    ("learning",),
    ("collection",),
    ("collection.external",),
    ("evaluation.fqe",),
    ("evaluation",),
    ("",),  # The package itself: `CalQL`, `CalQLConfig` and what puts them together.
    ("progress",),
    ("experiments.reading",),
    ("experiments",),
    ("study",),
    ("commands",),
)
MATHEMATICS = (
    *("common.metrics", "common.returns", "learning.losses"),
    *("networks.precision", "networks.side_by_side", "networks.kernel_layers"),
    *("networks.critic_kernel", "networks.actor_critic"),
    "evaluation.fqe.critics",
)
ROW_OF = {wing: row for row, wings in enumerate(WINGS) for wing in wings}


@dataclass(frozen=True)
class Import:
    """One import of a module of this package, or of another one (`target` None)."""

    name: str
    target: str | None
    is_deferred: bool
    line: int


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}


def _target(name: str) -> str | None:
    """The module of this package that an imported dotted name stands in."""
    if name != PACKAGE and not name.startswith(f"{PACKAGE}."):
        return None
    inner = name[len(PACKAGE) + 1 :]
    while inner not in MODULES:
        inner = inner.rpartition(".")[0]
    return inner


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(tree: ast.AST, is_deferred: bool = False) -> Iterator[Import]:
    """All imports that are executed: those for type checkers only are left out, `import_module("...")` is included."""
    for node in ast.iter_child_nodes(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for name in names:
            yield Import(name, _target(name), is_deferred, getattr(node, "lineno", 0))
        if _is_type_checking(node):
            assert isinstance(node, ast.If)
            yield from imports_of(ast.Module(node.orelse, []), is_deferred)
        else:
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports_of(node, is_deferred or is_function)


def imports_in(module: str) -> list[Import]:
    return list(imports_of(ast.parse(MODULES[module].read_text())))


# --- The reader of imports itself -------------------------------------------------------------------------------------


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
from typing import TYPE_CHECKING
import rllib_calql
from rllib_calql.common import metrics as keys
from rllib_calql.datasets.episodes.reader import DatasetInfo
if TYPE_CHECKING:
    from rllib_calql.commands.main import main
class A:
    def f(self):
        from rllib_calql.algorithm import CalQL
        import_module("rllib_calql.learning.learner")
"""
    found = [(i.target, i.is_deferred) for i in imports_of(ast.parse(source)) if i.target is not None]
    assert found == [
        ("", False),
        ("common.metrics", False),
        ("datasets.episodes.reader", False),
        ("algorithm", True),
        ("learning.learner", True),
    ]


# --- Wings ------------------------------------------------------------------------------------------------------------


def wing_of(module: str) -> str:
    """The folder that a module stands in, as a dotted name; "" for the package's own."""
    return ".".join(MODULES[module].relative_to(ROOT).parent.parts)


def test_every_wing_has_its_row() -> None:
    assert sorted(ROW_OF) == sorted({wing_of(module) for module in MODULES})
    assert len(ROW_OF) == sum(len(wings) for wings in WINGS)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_wing_and_from_below(module: str) -> None:
    wing = wing_of(module)
    upwards = [
        f"line {found.line}: {found.name}"
        for found in imports_in(module)
        if found.target is not None and wing_of(found.target) != wing and ROW_OF[wing_of(found.target)] >= ROW_OF[wing]
    ]
    assert upwards == []


def test_the_folders_stay_small() -> None:
    sizes = Counter(wing_of(module) for module in MODULES)
    assert sizes[""] <= 8
    assert {wing: size for wing, size in sizes.items() if size > 14} == {}


@pytest.mark.parametrize("wing", ROW_OF)
def test_every_wing_says_what_lives_in_it(wing: str) -> None:
    readme = ROOT.joinpath(*wing.split(".")) / "README.md"
    lines = readme.read_text().splitlines()
    assert 7 <= len(lines) <= 20


def test_the_package_itself_loads_nothing_but_the_registration() -> None:
    assert {found.target for found in imports_in("") if not found.is_deferred and found.target is not None} == {
        "registration"
    }


def test_nothing_but_rllib_stands_between_the_algorithm_and_cql() -> None:
    assert rllib_calql.CalQL.__mro__[:2] == (rllib_calql.CalQL, CQL)


@pytest.mark.parametrize("module", MATHEMATICS)
def test_the_mathematics_knows_no_ray(module: str) -> None:
    foreign = {found.name for found in imports_in(module) if found.name.split(".")[0] in ("ray", PACKAGE)}
    assert {
        name for name in foreign if not any(name.startswith(f"{PACKAGE}.{known}") for known in MATHEMATICS)
    } == set()


# --- Data are not programs --------------------------------------------------------------------------------------------

DECODER = "datasets.decoding.safe_decoding"
ADMITTED = {
    "datasets.decoding.pickle_instructions": ["pickletools"]
}  # It tells the instructions of a pickle and follows none.
READERS_OF_DATA = sorted(
    {module for module in MODULES if wing_of(module).split(".")[0] == "datasets"}
    | {f"store.{name}" for name in ("offline_data", "ingestion", "loading", "offline_table", "table_cache", "replay")}
    | {"store.transitions", "common.encoding"}
    | {module for module in MODULES if wing_of(module) == "policy"}
)
UNPICKLING_MODULES = (
    "pickle",
    "_pickle",
    "pickletools",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "copyreg",
    "msgpack_numpy",
    "ray.cloudpickle",
    "ray.rllib.utils.compression",
    "ray.rllib.utils.serialization",
    "torch.load",
    "pandas.read_pickle",
)
UNPICKLING_CALLS = ("unpack_if_needed", "read_pickle", "gym_space_from_dict", "space_from_dict", "torch.load")


def unpickling_in(tree: ast.AST) -> Iterator[str]:
    """What may unpickle: imports wherever they stand, calls by name, and NumPy's permission."""
    for found in imports_of(tree):
        if any(found.name == name or found.name.startswith(f"{name}.") for name in UNPICKLING_MODULES):
            yield f"line {found.line}: {found.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if any(called == name or called.endswith(f".{name}") for name in UNPICKLING_CALLS):
                yield f"line {node.lineno}: {called}"
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                    yield f"line {node.lineno}: allow_pickle"


def test_unpickling_is_found_wherever_it_stands() -> None:
    source = """
from ray import cloudpickle
def f():
    import pickle as p
    from ray.rllib.utils import compression
    import_module("msgpack_numpy")
    numpy.load(file, allow_pickle=True)
    numpy.load(file, allow_pickle=False)
    torch.load(file)
"""
    names = [found.partition(": ")[2] for found in unpickling_in(ast.parse(source))]
    expected = ["ray.cloudpickle", "pickle", "ray.rllib.utils.compression", "msgpack_numpy"]
    assert names == [*expected, "allow_pickle", "torch.load"]


@pytest.mark.parametrize("module", [module for module in READERS_OF_DATA if module != DECODER])
def test_a_module_that_reads_data_unpickles_nothing_itself(module: str) -> None:
    found = [one.partition(": ")[2] for one in unpickling_in(ast.parse(MODULES[module].read_text()))]
    assert found == ADMITTED.get(module, [])


# --- What a reader meets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_a_file_stays_readable_in_one_sitting(module: str) -> None:
    num_lines = len(MODULES[module].read_text().splitlines())
    assert num_lines <= MAX_LINES, f"{module or PACKAGE} has {num_lines} lines; split it by responsibility"


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """(dotted name, docstring) of public functions, classes, and methods of public classes."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield prefix + node.name, ast.get_docstring(node)
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_is_documented(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree)
    definitions = list(public_definitions(tree.body))
    assert [name for name, docstring in definitions if not docstring] == []


# --- Importing --------------------------------------------------------------------------------------------------------


def test_importing_the_package_is_light_and_silent() -> None:
    code = f"""
import sys
import {PACKAGE}
heavy = ("torch", "ray", "ray.rllib", "gymnasium", "minari", "mujoco", "gymnasium_robotics")
sys.exit(", ".join(name for name in heavy if name in sys.modules) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_mathematics_can_be_imported_without_rllib() -> None:
    names = ", ".join(f"{PACKAGE}.{name}" for name in MATHEMATICS)
    code = f"import sys; import {names}; sys.exit('ray.rllib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
