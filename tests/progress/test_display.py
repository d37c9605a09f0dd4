"""What is shown while a command runs, with a clock and trials that the test moves."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import pytest

from rllib_calql.progress.display import Display
from rllib_calql.progress.lines import Totals, TrialProgress
from rllib_calql.system.activity import Told

TOTALS = Totals(offline_updates=4_000, stop={"num_online_env_steps_lifetime": 2_000})
TICK_S = 0.25
UPDATES, ENV_STEPS = "num_offline_updates_lifetime", "num_online_env_steps_lifetime"


class Scene:
    """A display, its clock and what trials tell."""

    def __init__(self, **settings: Any) -> None:
        self.now = 100.0
        self.output = io.StringIO()
        self.told: dict[str, Told] = {}
        self.times: list[float] = []
        self.display = Display(self.output, clock=lambda: self.now, **settings)
        self.display.hear(self)

    def latest(self, name: str) -> Told | None:
        """Of a trial."""
        return self.told.get(name)

    def pass_time(self, seconds: float) -> None:
        """Moves the clock, with the ticks of the thread."""
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            before = self.output.tell()
            self.display.tick()
            if self.output.tell() != before:
                self.times.append(self.now - 100.0)

    @property
    def lines(self) -> list[str]:
        """All that was printed."""
        return self.output.getvalue().splitlines()


def test_a_stage_that_lasts_is_told_again_with_its_seconds() -> None:
    scene = Scene()
    scene.display.stage("starting Ray")
    scene.pass_time(10.0)
    assert scene.lines == ["0:00  starting Ray", "0:04  starting Ray, 4 s", "0:09  starting Ray, 9 s"]


def test_a_trial_in_one_long_call_gets_a_line_at_least_every_five_seconds_with_what_it_last_did() -> None:
    scene = Scene()
    scene.display.show("a", TrialProgress("CalQL_a", phase="offline", done=1_000, unit="updates"), TOTALS)
    scene.told["a"] = Told("evaluating, episode 4 of 10")
    scene.pass_time(60.0)
    gaps = [later - earlier for earlier, later in zip([0.0, *scene.times], [*scene.times, 60.0], strict=True)]
    assert max(gaps) <= 5.0
    assert scene.lines[-1].endswith("CalQL_a  offline  1,000 updates  evaluating, episode 4 of 10, 58 s")
    assert len(scene.lines) <= 1 + 60 / 4.5


def test_inside_an_iteration_the_counters_move_and_give_a_speed_before_there_is_a_result() -> None:
    scene = Scene()
    scene.display.show("a", TrialProgress("CalQL_a"), TOTALS)
    for done in range(0, 1_000, 25):  # 25 in 0.25 s are 100/s.
        scene.told["a"] = Told("updating", {UPDATES: done})
        scene.pass_time(TICK_S)
    assert re.fullmatch(r"0:09  CalQL_a  offline  9\d\d/4,000 updates  100/s  ETA 0:3\d  updating", scene.lines[-1])


def test_what_a_trial_told_before_the_switch_does_not_take_it_back_there() -> None:
    scene = Scene()
    scene.told["a"] = Told("updating", {UPDATES: 4_000})
    scene.display.show("a", TrialProgress("CalQL_a", phase="online", done=200, unit="env steps"), TOTALS)
    scene.pass_time(5.0)
    assert all("online  200 env steps" in line for line in scene.lines)
    scene.told["a"] = Told("collecting: 30 of ~200 env steps", {ENV_STEPS: 230})
    scene.pass_time(5.0)
    assert "online  230 env steps" in scene.lines[-1]
    assert "collecting: 30 of ~200 env steps" in scene.lines[-1]


def test_updates_after_the_first_env_steps_are_told_as_online_before_there_is_a_result_of_them() -> None:
    scene = Scene()
    scene.display.show("a", TrialProgress("CalQL_a", phase="offline", done=3_900, unit="updates"), TOTALS)
    for told in (
        Told("updating", {UPDATES: 4_000}),
        Told("collecting: 800 env steps", {ENV_STEPS: 800}),
        Told("updating: 387 of 800"),
    ):
        scene.told["a"] = told
        scene.pass_time(5.0)
    assert "CalQL_a  online  800/2,000 env steps" in scene.lines[-1]
    assert "updating: 387 of 800" in scene.lines[-1]
    scene.display.show("a", TrialProgress("CalQL_a", phase="online", done=700, unit="env steps"), TOTALS)
    scene.pass_time(5.0)
    assert "CalQL_a  online  700 env steps" in scene.lines[-1]  # The result knows better.


def test_while_a_trial_starts_each_kind_of_work_gets_a_line_at_once_but_percentages_do_not() -> None:
    scene = Scene()
    scene.display.show("a", TrialProgress("CalQL_a"), TOTALS)
    for text in ("building (networks on cpu)", "reading data 10 % (a)", "reading data 60 % (a)"):
        scene.told["a"] = Told(text)
        scene.pass_time(1.0)
    for text in ("first updates", "updating"):
        scene.told["a"] = Told(text, {UPDATES: 10})
        scene.pass_time(1.0)
    shown = [line.rpartition("  ")[2] for line in scene.lines]
    assert shown == ["its process", "building (networks on cpu)", "reading data 10 % (a)", "first updates"]


def test_in_logs_many_trials_share_a_line() -> None:
    scene = Scene()
    for number in range(12):
        scene.display.show(str(number), TrialProgress(f"CalQL_{number}", phase="offline", unit="updates"), TOTALS)
    scene.display.end("11")
    before = len(scene.lines)
    scene.pass_time(20.0)
    assert 4 <= len(scene.lines) - before <= 5
    assert scene.lines[-1] == "0:18  11 trials: 11 offline  1 ended"


def test_on_terminals_the_number_of_lines_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm")
    scene = Scene(is_terminal=True)
    for number in range(40):
        scene.display.show(str(number), TrialProgress(f"CalQL_{number:02}", phase="offline", unit="updates"), TOTALS)
    before = scene.output.tell()
    scene.pass_time(TICK_S)
    refreshed = scene.output.getvalue()[before:]
    scene.display.close()
    assert refreshed.count("\n") == 10  # Ten trials and one line for all, the last without an end.
    assert "40 trials: 40 offline" in refreshed
    assert "\x1b[2K" in refreshed  # Lines are cleared and written again.


def test_the_end_of_a_pipe_does_not_end_the_run() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    display = Display(Closed())
    display.stage("starting Ray")
    display.print("a summary")


def test_the_first_line_comes_before_ray_and_torch_are_loaded() -> None:
    code = """
import sys
from rllib_calql.commands import main
def prepare(verbose):
    print([name for name in ("ray", "torch", "numpy") if name in sys.modules])
    sys.exit()
main.prepare = prepare
main.main(["train", "file", "e.yaml"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "0:00  loading RLlib\n[]\n", done.stderr
