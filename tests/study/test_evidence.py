"""What the documents say about other algorithms, against the raw results in `evidence/`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from rllib_calql.commands.main import main
from rllib_calql.study.evaluations import read_results
from rllib_calql.study.plan import read_study

ROOT = Path(__file__).parents[2]
EVIDENCE = Path(__file__).parents[1] / "evidence"
FOLDERS = sorted(path.parent for path in EVIDENCE.glob("*/study.json"))
STUDIES = sorted((ROOT / "tuned_examples" / "studies").glob("*.yaml"))
MAX_BYTES = 2_000_000
README = ROOT / "README.md"
# The section of each study, by the folder of raw results that it links to.
SECTIONS = {
    found[1]: section
    for section in (EVIDENCE / "README.md").read_text().split("\n## ")
    if (found := re.search(r"Raw\s+results:\s+\[\w+\]\((\w+)\)", section))
}

studies = pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])


def _tables(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


@studies
def test_one_command_makes_the_report_and_the_tables_of_the_document(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(folder), "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert _tables(SECTIONS[folder.name]) == _tables((tmp_path / "summary.md").read_text())
    assert f"`tuned_examples/studies/{folder.name}.yaml`" in SECTIONS[folder.name]
    page = (tmp_path / "report.html").read_text()
    assert "Learning curves" in page
    assert "Cumulative regret online" in page


def test_the_table_of_the_readme_is_that_of_the_document() -> None:
    rows = re.findall(
        r"^\| \[.*?\]\(tests/evidence/README\.md#(.*?)\) \| (.*) \|$", README.read_text(), flags=re.MULTILINE
    )
    assert len(rows) == 6
    for anchor, numbers in rows:
        (section,) = (text for text in SECTIONS.values() if _anchor_of(text) == anchor)
        names = [cell.strip() for cell in _tables(section)[0].split("|")]
        final, regret = names.index("final score (mean)"), names.index("regret (mean)")
        cells = {line.split(" | ")[0]: ["", *line[2:-2].split(" | ")] for line in _tables(section)}
        cal_ql, cql = cells["| Cal-QL"], cells["| CQL"]
        assert numbers.split(" | ") == [cal_ql[final], cql[final], cal_ql[regret], cql[regret]], anchor


def test_the_numbers_of_other_algorithms_in_the_readme_are_those_of_the_document() -> None:
    table = _tables(SECTIONS["pointmaze_umaze"])
    column = [cell.strip() for cell in table[0].split("|")].index("final score (mean)")
    final = {cells[1].strip(): cells[column].strip() for cells in (line.split("|") for line in table[2:])}
    said = " ".join(README.read_text().split())
    assert f"WSRL ends at {final['WSRL']}, cloning at {final['BC']}, RLPD at {final['RLPD']}, SAC at 0.00, with" in said
    assert final["SAC alone"] == final["SAC with the data"] == "0.00 [0.00, 0.00]"


def _anchor_of(section: str) -> str:
    return section.split("\n")[0].lower().replace(",", "").replace(" ", "-")


@pytest.fixture
def _data_of_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What scripts write for their studies: that it is there is looked for, not what it holds.

    The environment of one study stands in its script.
    """
    for name in ("pointmaze_umaze_demos_references", "demonstrations_noisy", "medium_noisy", "sticky_noisy"):
        (tmp_path / f"{name}.npz").touch()
    monkeypatch.syspath_prepend(ROOT / "tuned_examples" / "studies")
    monkeypatch.chdir(tmp_path)


@studies
@pytest.mark.usefixtures("_data_of_scripts")
def test_the_results_are_whole_and_of_the_settings_that_the_study_file_has(folder: Path) -> None:
    rows, description = read_results(folder)
    study = read_study(ROOT / "tuned_examples" / "studies" / f"{folder.name}.yaml")
    assert {key: description[key] for key in study.description} == study.description
    assert len(study.description["seeds"]) >= 5
    assert {(row.task, row.algorithm, row.seed) for row in rows} == {
        (trial.task, trial.algorithm, trial.seed) for trial in study.trials
    }
    for trial in study.trials:
        its = [row for row in rows if (row.task, row.algorithm, row.seed) == (trial.task, trial.algorithm, trial.seed)]
        assert max(row.num_online_env_steps for row in its) >= trial.schedule.num_env_steps


@pytest.mark.parametrize("file", STUDIES, ids=[file.stem for file in STUDIES])
@pytest.mark.usefixtures("_data_of_scripts")
def test_every_study_file_is_right_and_has_five_seeds(file: Path) -> None:
    study = read_study(file)
    seeds_of: dict[tuple[str, str], set[int]] = {}
    for trial in study.trials:
        seeds_of.setdefault((trial.task, trial.algorithm), set()).add(trial.seed)
    assert len(seeds_of) > 1
    assert all(len(seeds) >= 5 for seeds in seeds_of.values())


def test_the_raw_results_are_small() -> None:
    assert sum(file.stat().st_size for file in EVIDENCE.rglob("*") if file.is_file()) < MAX_BYTES
