"""The house stands: nothing imports upwards, the mathematics knows no Ray, files stay readable, everything is said."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import rllib_calql

PACKAGE = "rllib_calql"
ROOT = Path(rllib_calql.__file__).parent
MAX_LINES = 450

# From the ground up. A module may import from the rows above its own only, never from its own row. "" is the package.
LAYERS = (
    ("stop_signals", "worker_signals", "env_errors", "ray_processes"),
    ("parsed_json", "metrics", "plain_names", "returns", "losses", "registration", "held_data", "versions", "spaces"),
    ("file_lock",),
    ("checkpoint_folders", "shared_data"),
    ("integrity",),
    ("checkpoint",),
    ("allocator", "critic_kernel", "graphed_steps", "precision"),
    ("networks", "image_encoder"),
    ("model_settings",),
    ("datasets.pickle_instructions",),
    ("datasets.magnitudes", "datasets.safe_decoding", "datasets.other_tools", "datasets.recorded_values"),
    ("datasets.episodes", "datasets.columns", "datasets.summary", "datasets.staging", "datasets.minari_storage"),
    (
        "datasets.pointmaze",
        "datasets.pendulum",
        "datasets.pixel_reach",
        "datasets.cube",
        "datasets.hopper_training",
        "datasets.report",
    ),
    ("datasets.hopper",),
    ("datasets.files", "datasets.flat_columns", "datasets.arrow", "datasets.boundaries", "datasets.plots"),
    ("datasets.catalog",),
    (
        "datasets.episode_index",
        "datasets.chunks",
        "datasets.arrow_columns",
        "datasets.file_formats",
        "datasets.packed_episodes",
        "datasets.minari_episodes",
        "datasets.final_rows",
    ),
    ("datasets.flat_episodes",),
    ("datasets.flat", "datasets.arrow_rows"),
    ("datasets.hdf5", "datasets.npz", "datasets.parquet", "datasets.in_memory", "datasets.minari"),
    ("datasets.rllib_recorded", "datasets.writers"),
    ("datasets.recording",),
    ("datasets",),
    ("datasets.conversion",),
    ("input_settings", "refused_settings"),
    ("skipped_updates", "callbacks", "connectors", "collection", "diagnostics", "evaluation_history", "config_checks"),
    ("offline_table", "transitions", "resolution", "divergence"),
    ("rl_module",),
    ("replay", "table_cache", "ingestion", "env_connectors"),
    ("loading", "settings", "manifest", "resident_store"),
    ("config",),
    ("optimisers",),
    ("offline_data", "learner", "resuming", "collector", "learner_recovery"),
    ("updating",),
    ("collecting",),
    ("algorithm",),
    ("",),
    ("experiment_errors",),
    ("search_spaces",),
    ("schedulers", "typed_settings"),
    ("experiment",),
    ("progress", "run_state", "run_folders"),
    ("resume_run", "tune_callbacks"),
    ("tune_runs",),
    ("study",),
    ("study.evaluations", "command_setup"),
    ("study.statistics", "study.folder"),
    ("study.plan",),
    ("study.plots", "study.trial"),
    ("study.report", "study.runner"),
    ("dataset_cli", "study_cli"),
    ("cli",),
)
MATHEMATICS = {f"{PACKAGE}.critic_kernel", f"{PACKAGE}.critic_kernel.evaluate_by_kernel"}
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}

# Imports upwards that stand inside a function, so that they run only once both modules are loaded.
DEFERRED_UPWARDS = {
    ("registration", "algorithm"): "the name is resolved to the class on first use, which keeps the import light",
    ("config", "algorithm"): "RLlib's config names the class it configures, and that class its default config",
    ("config", "offline_data"): "RLlib asks the config for the class that holds the offline data",
    ("config", "learner"): "RLlib asks the config for the class of the learner",
}


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
from rllib_calql import metrics as keys
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
        ("metrics", False),
        ("datasets.episodes", False),
        ("algorithm", True),
        ("learner", True),
    ]


# --- Layers -----------------------------------------------------------------------------------------------------------


def test_every_module_has_its_layer() -> None:
    assert sorted(LAYER_OF) == sorted(MODULES)
    assert len(LAYER_OF) == sum(len(layer) for layer in LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_below(module: str) -> None:
    upwards = [
        f"line {found.line}: {found.name}"
        for found in imports_in(module)
        if found.target is not None
        and LAYER_OF[found.target] >= LAYER_OF[module]
        and not (found.is_deferred and (module, found.target) in DEFERRED_UPWARDS)
        # The package's own initialisation runs before any of its modules and loads nothing above `registration`.
        and not (module == "" and found.target == "registration")
    ]
    assert upwards == []


def test_no_exemption_is_kept_that_is_not_needed() -> None:
    deferred = {(module, found.target) for module in MODULES for found in imports_in(module) if found.is_deferred}
    assert set(DEFERRED_UPWARDS) <= deferred
    assert all(LAYER_OF[target] > LAYER_OF[module] for module, target in DEFERRED_UPWARDS)


def test_the_package_itself_loads_nothing_but_the_registration() -> None:
    assert {found.target for found in imports_in("") if not found.is_deferred and found.target is not None} == {
        "registration"
    }


@pytest.mark.parametrize("module", ["losses", "returns", "critic_kernel", "precision", "networks", "metrics"])
def test_the_mathematics_knows_no_ray(module: str) -> None:
    names = {found.name for found in imports_in(module)}
    assert {name for name in names if name.split(".")[0] in ("ray", PACKAGE)} <= MATHEMATICS


# --- Data are not programs --------------------------------------------------------------------------------------------

DECODER = "datasets.safe_decoding"
ADMITTED = {"datasets.pickle_instructions": ["pickletools"]}  # It tells the instructions of a pickle and follows none.
READERS_OF_DATA = sorted(
    {module for module in MODULES if module == "datasets" or module.startswith("datasets.")}
    | {"offline_data", "ingestion", "loading", "offline_table", "table_cache", "transitions", "replay"}
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
heavy = ("torch", "ray.rllib", "gymnasium", "minari", "mujoco", "gymnasium_robotics")
sys.exit(", ".join(name for name in heavy if name in sys.modules) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_mathematics_can_be_imported_without_rllib() -> None:
    names = ", ".join(f"{PACKAGE}.{name}" for name in ("losses", "returns", "networks", "metrics"))
    code = f"import sys; import {names}; sys.exit('ray.rllib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
