"""The documents: code blocks run, commands and links are right, tables of settings and metrics agree with the code."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import ray

from rllib_calql import CalQLConfig
from rllib_calql.commands.main import main
from rllib_calql.common import metrics
from rllib_calql.datasets import generated_dataset_ids
from rllib_calql.experiments.experiment import read_experiments

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FOLDERS = ("rllib_calql", "tests", "tuned_examples")  # Beside them may lie what is not the project's.
DOCUMENTS = [README, *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
LANGUAGES = {"python", "python continues", "bash", "yaml", "bibtex"}
MAX_COLUMNS = 120
# Sizes are cut for the test; nothing else is touched.
_SHORTER = [
    (r"\(offline_updates=2_000\)", "(offline_updates=2_000, updates_per_env_step=1)"),
    (r"offline_updates=\d[\d_]*", "offline_updates=4, updates_per_iteration=2"),
    (r"updates_per_env_step=1", "updates_per_env_step=0.05"),
    (r"num_offline_updates_lifetime\": 2_000", 'num_offline_updates_lifetime": 4'),
    (r"evaluation_duration=10", "evaluation_duration=1"),
    (r"range\(5\)", "range(3)"),
]

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


class Block(NamedTuple):
    """A fenced block: where it begins, its language, its content."""

    document: Path
    line: int
    language: str
    content: str


def _blocks(document: Path) -> list[Block]:
    text = document.read_text()
    return [
        Block(document, text[: found.start()].count("\n") + 1, found[1], found[2])
        for found in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    ]


BLOCKS = [block for document in DOCUMENTS for block in _blocks(document)]


def _prose(document: Path) -> str:
    """The text without fenced blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def _spans(document: Path) -> list[str]:
    """What stands in backticks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _prose(document))]


def _python_programs() -> list[Block]:
    """Each block by itself; one marked `continues` with the one before it."""
    programs: list[Block] = []
    for block in BLOCKS:
        if block.language == "python continues":
            assert programs[-1].document == block.document
            programs[-1] = programs[-1]._replace(content=programs[-1].content + block.content)
        elif block.language == "python":
            programs.append(block)
    return programs


# --- Code blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    "program", _python_programs(), ids=lambda block: f"{block.document.relative_to(ROOT)}-{block.line}"
)
def test_python_blocks_run(program: Block, tmp_path: Path) -> None:
    code = program.content
    for pattern, shorter in _SHORTER:
        code = re.sub(pattern, shorter, code)
    script = tmp_path / "block.py"
    address = ray.get_runtime_context().gcs_address
    script.write_text(f"import ray\nray.init(address={address!r}, log_to_driver=False)\n{code}")
    environment = {**os.environ, "RAY_ADDRESS": "local"}  # Whatever else runs on the machine.
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_the_readme_shows_the_three_ways_of_use() -> None:
    ways = ["python", "python continues", "yaml", "python"]
    assert [block.language for block in _blocks(README)] == ["bash", "bash", *ways, "bibtex"]


def test_every_block_is_of_a_language_that_is_tested() -> None:
    assert {block.language for block in BLOCKS} == LANGUAGES


def test_yaml_blocks_are_valid_experiments(tmp_path: Path) -> None:
    blocks = [block for block in BLOCKS if block.language == "yaml"]
    assert blocks
    for number, block in enumerate(blocks):
        path = tmp_path / f"experiment_{number}.yaml"
        path.write_text(block.content)
        (experiment,) = read_experiments(path)
        assert experiment.stop == {"num_online_env_steps_lifetime": 2000}
        if block.document == README:
            assert experiment.config.actor_lr == 3e-4


def _check_command(words: list[str]) -> None:
    """Fails if the `rllib` command has no such sub-command or option, or a file of the project is not there."""
    program, *arguments = words
    assert program in ("rllib", "python", "pip", "ray", "cd"), words
    for word in arguments:
        if word.split("/")[0] in FOLDERS:
            assert (ROOT / word).exists(), words
    if program != "rllib":
        return
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group) and arguments:
        name = arguments.pop(0)
        below = command.get_command(context, name)
        assert below is not None, words
        command, context = below, click.Context(below, info_name=name, parent=context)
    command.make_parser(context).parse_args(arguments)


@documents
def test_commands_exist_with_their_options(document: Path) -> None:
    blocks = [block.content for block in _blocks(document) if block.language == "bash"]
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [span for span in _spans(document) if re.match(r"(rllib|python) \w", span)]
    for line in lines:
        for part in line.split("&&"):
            _check_command(shlex.split(part, comments=True))


def test_a_wrong_command_is_noticed() -> None:
    for words in ("rllib train fiel X", "rllib train file X --sede 1", "rllib study tuned_examples/none.yaml", "make"):
        with pytest.raises((AssertionError, click.UsageError)):
            _check_command(words.split())


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = dict(re.findall(r"<!-- command: (.*?) -->\n```bash\n(.*?)\n```", README.read_text()))
    assert commands == {
        "main job": 'pip install ".[examples]" && rllib train file tuned_examples/pointmaze_umaze.yaml',
        "test": 'pip install -e ".[test]" && python -m pytest -n 2 --dist loadfile',
    }
    assert "<!-- command: test -->" in (ROOT / ".ci" / "run").read_text()


# --- Form and links ---------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 250


@documents
def test_lines_but_those_of_tables_are_short(document: Path) -> None:
    lines = document.read_text().splitlines()
    assert [line for line in lines if len(line) > MAX_COLUMNS and not line.startswith("|")] == []


@documents
def test_tables_have_as_many_cells_in_every_row(document: Path) -> None:
    rows = [line.replace(r"\|", "") if line.startswith("|") else None for line in _prose(document).splitlines()]
    for above, row in pairwise(rows):
        if above is not None and row is not None:
            assert row.count("|") == above.count("|"), row


def _anchors(document: Path) -> set[str]:
    """Anchors of headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _links(document: Path) -> list[tuple[Path, str]]:
    """Targets inside the project, and anchors in them ("" for none)."""
    targets = re.findall(r"\]\(([^)\s]+)\)", _prose(document))
    links = []
    for target in targets:
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            links.append(((document.parent / path).resolve() if path else document, anchor))
    return links


@documents
def test_links_lead_somewhere(document: Path) -> None:
    for path, anchor in _links(document):
        assert path.exists(), path
        assert not anchor or anchor in _anchors(path), (path, anchor)


@documents
def test_files_that_are_named_exist(document: Path) -> None:
    named = [span for span in _spans(document) if re.fullmatch(r"[\w./]*\w\.(py|yaml|json|jsonl|parquet|png)", span)]
    written = {
        "calql.json",
        "result.json",
        "evaluations.parquet",
        "study.json",
        "play.parquet",
        "progress.png",
        "columns.yaml",
        "meta/info.json",
    }  # By the commands described, and beside logs.
    places = (document.parent, ROOT, ROOT / "rllib_calql", ROOT / "tests" / "datasets" / "readers")
    assert [n for n in named if n not in written and not any((place / n).exists() for place in places)] == []


def test_every_document_can_be_reached_from_the_readme() -> None:
    reached = {README}
    waiting = [README]
    while waiting:
        for path, _ in _links(waiting.pop()):
            if path.suffix == ".md" and path not in reached:
                reached.add(path)
                waiting.append(path)
    wings = {path for path in DOCUMENTS if path.name == "README.md" and "rllib_calql" in path.parts}
    assert set(DOCUMENTS) - reached - wings == set()  # The wings are listed in that of the package.


@pytest.mark.parametrize(
    ("document", "anchor", "words"),
    [
        ("rllib_calql/datasets/FORMATS.md", "your-own-hdf5-logs", ["`terminals`", "`timeouts`", "h5py"]),
        ("rllib_calql/settings/SETTINGS.md", "", ["| `min_q_weight` | `5.0` |"]),
        ("tuned_examples/own_system/README.md", "", ["pandas", "python convert_logs.py", "rllib train file tank.yaml"]),
        ("tuned_examples/README.md", "resuming", ["--resume"]),
        ("tests/evidence/README.md", "pointmaze-medium", ["regret", "0.10 [0.03, 0.19]", "0.83 [0.69, 0.95]"]),
        ("rllib_calql/collection/DISTRIBUTED.md", "on-several-machines", ["ray start --head", "--address auto"]),
    ],
)
def test_what_new_users_look_for_is_one_link_away(document: str, anchor: str, words: list[str]) -> None:
    assert (ROOT / document, anchor) in _links(README)
    sections = re.split(r"^(?=## )", (ROOT / document).read_text(), flags=re.MULTILINE)
    (section,) = (
        [text for text in sections if text[3:].split("\n")[0].lower().replace(" ", "-") == anchor]
        if anchor
        else ["\n".join(sections)]
    )
    assert [word for word in words if word not in section] == []


# --- Tables -----------------------------------------------------------------------------------------------------------


def _section(name: str, heading: str) -> str:
    """A section of second order of a document."""
    return (ROOT / name).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize(
    "method", ["training", "offline_data", "fine_tuning", "external_clients", "evaluation", "rl_module"]
)
def test_the_tables_of_settings_list_every_setting_with_its_default(method: str) -> None:
    config = CalQLConfig()
    if method == "rl_module":
        own = set(config._model_config)
        heading = "`.rl_module(model_config={...})`"
    else:
        own = set(inspect.signature(getattr(CalQLConfig, method)).parameters) - {"self", "kwargs"}
        heading = f"`.{method}(...)`"
    rows = re.findall(
        r"^\| `(\w+)` \| `?(.*?)`? \| ([PARDO]) \| \S", _section("rllib_calql/settings/SETTINGS.md", heading), re.M
    )
    assert sorted(name for name, _, _ in rows) == sorted(own)
    for name, text, _ in rows:
        value = config.model_config[name] if method == "rl_module" else getattr(config, name)
        assert text == ('"' + value + '"' if isinstance(value, str) else str(value)), name


def test_the_tables_of_metrics_list_every_key() -> None:
    cells = re.findall(r"^\| (`.*?) \| ", (ROOT / "rllib_calql/common/METRICS.md").read_text(), flags=re.M)
    documented = [key for cell in cells for key in re.findall(r"`(.*?)`", cell)]
    own = {value for name, value in vars(metrics).items() if name.isupper()}
    parents = {metrics.FINE_TUNING, metrics.STORE, metrics.COLLECTION, metrics.HELD_OUT, metrics.FQE}
    values = {metrics.OFFLINE, metrics.ONLINE}
    assert len(set(documented)) == len(documented)
    names = {key.split("/")[-1] for key in documented}
    assert names == (own - parents - values) | {"episode_return_mean"}
    above = {level for key in documented for level in key.split("/")[:-1]}
    assert above == parents | {"evaluation", "env_runners"}


def test_the_table_of_generated_data_sets_lists_all() -> None:
    section = _section("rllib_calql/datasets/FORMATS.md", "Generated data sets")
    names = []
    for name in re.findall(r"^\| `([\w{},-]+)` \|", section, flags=re.MULTILINE):
        before, _, rest = name.partition("{")
        choices, _, after = rest.partition("}")
        names += [f"rllib-calql/{before}{choice}{after}" for choice in choices.split(",")]
    assert sorted(names) == sorted(generated_dataset_ids())


def test_the_table_of_recipes_lists_all() -> None:
    text, _, _ = (ROOT / "tuned_examples/README.md").read_text().partition("\n## ")
    cells = re.findall(r"^\| (`.*?) \| ", text, flags=re.MULTILINE)
    recipes = {path.name for path in (ROOT / "tuned_examples").iterdir() if path.suffix in (".yaml", ".py")}
    assert {name for cell in cells for name in re.findall(r"`(.*?)`", cell)} == recipes
