"""One recorded episode for a person: text, JSON, a picture, and a page that needs nothing beside it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rllib_calql.datasets.report.episode import EpisodeView, Numbers
from rllib_calql.datasets.report.plots import require_matplotlib
from rllib_calql.datasets.report.summary import format_number
from rllib_calql.progress import pages
from rllib_calql.progress.drawing import COLOURS, line_style, new_figure, png, shown_name, write_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rllib_calql.evaluation.episode_values import EpisodeValues

_MOST_LINES = 8  # Numbers in one panel; more become rows of a map.
_MOST_NAMED_ROWS = 40  # Of a map.
_MOST_ROWS = 500
_MOST_FRAMES = 8
_ENV_UNIT = "[environment's units]"
_FEW_STEPS = 60  # Up to which each step has its mark.


def as_text(view: EpisodeView, values: EpisodeValues | None) -> str:
    """What is known of the episode, a line each."""
    facts = _facts(view, values)
    width = max(len(name) for name, _ in facts) + 2
    return "\n".join(f"{name.ljust(width)}{text}" for name, text in facts)


def as_json(view: EpisodeView, values: EpisodeValues | None) -> str:
    """The numbers of all steps."""
    settings = view.settings
    content: dict[str, Any] = {
        "dataset": view.name,
        "id": view.id,
        "index": view.index,
        "num_steps": view.num_steps,
        "terminated": view.is_terminated,
        "rewards": view.rewards.tolist(),
        "is_intervention": None if view.is_intervention is None else view.is_intervention.tolist(),
        "gamma": settings.gamma,
        "reward_scale": settings.reward_scale,
        "reward_bias": settings.reward_bias,
        "truncation": settings.truncation,
        "returns_to_go": view.returns_to_go.tolist(),
    }
    if values is not None:
        reference = values.reference
        content |= {
            "q": values.q.tolist(),
            "value": values.value.tolist(),
            "reference": None if reference is None else reference.tolist(),
            "reference_value": values.reference_name or "returns_to_go",
        }
    return json.dumps(content, indent=2)


def page(view: EpisodeView, values: EpisodeValues | None, picture: bytes) -> str:
    """A whole page in HTML."""
    title = f"Episode {shown_name(view.id)}"
    return pages.page(
        title,
        [
            f"<h1>{html.escape(title)}</h1>",
            pages.table(["", ""], _facts(view, values)),
            *(f"<p>{html.escape(note)}</p>" for note in _notes(view, values)),
            pages.image(title, picture),
        ],
    )


def draw(view: EpisodeView, values: EpisodeValues | None) -> bytes:
    """PNG with a panel each for images, observations, actions, rewards, and returns with values, over the steps.

    Raises:
        ImportError: If Matplotlib is not installed.
    """
    require_matplotlib()
    heights = {"frames": 1.3, "observations": 2.3, "actions": 2.0, "executed": 2.0, "rewards": 1.4, "values": 2.6}
    shown = ["frames"] * len(view.images) + (["observations"] if view.observations else [])
    shown += ["actions"] if view.actions else []
    has_own_panel = bool(view.executed) and view.are_module_actions  # Their units are different ones.
    shown += ["executed"] if has_own_panel else []
    shown += ["rewards", "values"]
    sizes = [_height(name, view, heights[name]) for name in shown]
    figure = new_figure(10.5, 0.9 + sum(sizes))
    figure.suptitle(f"{shown_name(view.name)}, episode {shown_name(view.id)}", parse_math=False, fontsize=11)
    rows = figure.add_gridspec(len(shown), 1, height_ratios=sizes)
    images = list(view.images.items())
    for row, (name, frames) in enumerate(images):
        _draw_frames(figure, rows[row], name, frames)
    all_axes: list[Axes] = []
    for row in range(len(images), len(shown)):
        all_axes.append(figure.add_subplot(rows[row], sharex=all_axes[0] if all_axes else None))
    for axes, what in zip(all_axes, shown[len(images) :], strict=True):
        if what == "observations":
            _draw_numbers(axes, "observations", view.observations)
        elif what == "actions":
            unit = "[-1, 1] of the policy" if view.are_module_actions else _ENV_UNIT
            _draw_numbers(axes, f"actions\n{unit}", view.actions, () if has_own_panel else view.executed)
        elif what == "executed":
            _draw_numbers(axes, f"executed actions\n{_ENV_UNIT}", view.executed)
        elif what == "rewards":
            _draw_rewards(axes, view)
        else:
            _draw_values(axes, view, values)
        _mark_interventions(axes, view, labelled=axes is all_axes[0])
        axes.set_xlim(-0.5, view.num_steps - 0.5)
        axes.tick_params(labelbottom=axes is all_axes[-1])
    from matplotlib.ticker import MaxNLocator

    all_axes[-1].xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    all_axes[-1].set_xlabel("step of the episode")
    return png(figure)


def unit_of(view: EpisodeView) -> str:
    """What the returns and values are measured in."""
    scale, bias = view.settings.reward_scale, view.settings.reward_bias
    if scale == 1.0 and bias == 0.0:
        return "environment rewards"
    sign = "-" if bias < 0 else "+"
    return f"training rewards: {scale:g} * reward {sign} {abs(bias):g}"


def _facts(view: EpisodeView, values: EpisodeValues | None) -> list[tuple[str, str]]:
    settings = view.settings
    end = "terminated" if view.is_terminated else "cut (truncated)"
    facts = [
        ("dataset", view.name),
        ("episode", f"{view.id!r}, number {view.index} of those in the data"),
        ("steps", f"{view.num_steps:,}, {end}"),
        ("return", f"{format_number(float(view.rewards.sum()))} (environment rewards, not discounted)"),
        (
            "return-to-go",
            f"{format_number(float(view.returns_to_go[0]))} at the first step, discounted by {settings.gamma:g} "
            f"({unit_of(view)})",
        ),
    ]
    if not view.is_terminated:
        facts.append(("cut episodes", f"by the rule {settings.truncation!r} for what follows the last step"))
    if view.is_intervention is not None:
        facts.append(("interventions", f"a person acted in {int(view.is_intervention.sum()):,} steps"))
    if values is not None:
        mean = values.q.mean(axis=0)
        facts += [
            ("Q(s, a)", f"{_at_first(mean)} at the first step, mean of {len(values.q)} critics at the data's action"),
            ("V(s)", f"{_at_first(values.value)} at the first step, least target critic at the policy's greedy action"),
            ("Q - return", f"{format_number(float((mean - view.returns_to_go).mean()))} on average over the steps"),
        ]
    return facts


def _notes(view: EpisodeView, values: EpisodeValues | None) -> list[str]:
    """What is not drawn, and why."""
    notes = []
    if values is not None and values.reference is None and values.reference_name:
        notes.append(
            f"The reference value of the checkpoint, {values.reference_name!r}, is not drawn: it is not in the "
            "checkpoint and not in these data."
        )
    if len(view.observations) > _MOST_ROWS:
        notes.append(f"Of {len(view.observations):,} numbers of the observations the first {_MOST_ROWS} are drawn.")
    return notes


def _at_first(values: NDArray[Any]) -> str:
    return format_number(float(values[0]))


def _height(what: str, view: EpisodeView, usual: float) -> float:
    """Inches of a panel: maps of many numbers take more."""
    numbers = {"observations": view.observations, "actions": view.actions, "executed": view.executed}.get(what, ())
    return usual if len(numbers) <= _MOST_LINES else max(usual, min(7.0, 0.17 * len(numbers)))


def _marks(num_steps: int) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.0} if num_steps <= _FEW_STEPS else {}


def _draw_numbers(axes: Axes, label: str, numbers: Numbers, executed: Numbers = ()) -> None:
    """Numbers over time, [T] each: lines, or a map of many."""
    axes.set_ylabel(label)
    if len(numbers) > _MOST_LINES:
        _draw_map(axes, _executed_in_place(numbers, executed)[:_MOST_ROWS])
        return
    steps = np.arange(len(numbers[0][1]))
    for number, (full_name, values) in enumerate(numbers):
        name = shown_name(full_name)
        style = line_style(number)
        has_executed = number < len(executed)
        if has_executed:
            axes.plot(steps, values, linewidth=1.0, alpha=0.6, **{**style, "linestyle": "dotted"})
            axes.plot(steps, executed[number][1], linewidth=1.4, label=name, **_marks(len(steps)), **style)
        else:
            axes.plot(steps, values, linewidth=1.4, label=name, **_marks(len(steps)), **style)
    if executed:
        axes.plot([], [], color="#444444", linewidth=1.0, linestyle="dotted", label="asked for")
        axes.plot([], [], color="#444444", linewidth=1.4, label="executed")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(axes)


def _executed_in_place(numbers: Numbers, executed: Numbers) -> list[tuple[str, NDArray[Any]]]:
    """What was done: the executed action where it is known, else the one asked for."""
    if not executed:
        return list(numbers)
    pairs = zip(numbers, executed, strict=True)
    return [(name, np.where(np.isnan(done), asked, done)) for (name, asked), (_, done) in pairs]


def _draw_map(axes: Axes, numbers: Sequence[tuple[str, NDArray[Any]]]) -> None:
    """A row for each number, from its least (dark) to its largest value in the episode."""
    rows = np.array([values.astype(np.float64) for _, values in numbers])
    told = np.where(np.isnan(rows), np.inf, rows), np.where(np.isnan(rows), -np.inf, rows)  # Executed ones have gaps.
    low, high = told[0].min(axis=1, keepdims=True), told[1].max(axis=1, keepdims=True)
    scaled = np.divide(rows - low, high - low, out=np.full_like(rows, 0.5), where=high > low)
    extent = (-0.5, rows.shape[1] - 0.5, len(rows) - 0.5, -0.5)
    axes.imshow(scaled, aspect="auto", cmap="cividis", vmin=0.0, vmax=1.0, extent=extent, interpolation="nearest")
    axes.set_ylabel(f"{axes.get_ylabel()}\ndark: least, bright: largest\nof each in the episode")
    if len(rows) <= _MOST_NAMED_ROWS:
        ranges = [
            f"{format_number(float(a))} to {format_number(float(b))}"
            for a, b in zip(low[:, 0], high[:, 0], strict=True)
        ]
        labels = [f"{shown_name(name)}  {text}" for (name, _), text in zip(numbers, ranges, strict=True)]
        axes.set_yticks(range(len(rows)), labels, fontsize=7.5, parse_math=False)


def _draw_rewards(axes: Axes, view: EpisodeView) -> None:
    steps = np.arange(view.num_steps)
    if view.num_steps <= _FEW_STEPS:
        axes.vlines(steps, np.minimum(view.rewards, 0.0), np.maximum(view.rewards, 0.0), color=COLOURS[0], alpha=0.5)
    axes.plot(steps, view.rewards, color=COLOURS[0], linewidth=1.2, drawstyle="steps-mid", **_marks(view.num_steps))
    axes.set_ylabel(f"reward\n{_ENV_UNIT}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_values(axes: Axes, view: EpisodeView, values: EpisodeValues | None) -> None:
    steps, marks = np.arange(view.num_steps), _marks(view.num_steps)
    unit = unit_of(view).replace(": ", ":\n")
    axes.set_ylabel(f"discounted by {view.settings.gamma:g}\n[{unit}]")
    axes.plot(steps, view.returns_to_go, color="black", linewidth=1.6, label="return-to-go of the data", **marks)
    if values is not None:
        count = len(values.q)
        label = (
            "Q(s, a) of the data's action" if count == 1 else f"Q(s, a) of the data's action, mean of {count} critics"
        )
        axes.plot(steps, values.q.mean(axis=0), color=COLOURS[0], linewidth=1.6, label=label, **marks)
        if count > 1:
            low, high = values.q.min(axis=0), values.q.max(axis=0)
            axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.2, label="least to largest critic")
        policy = "V(s): least target critic at the policy's action"
        axes.plot(steps, values.value, color=COLOURS[1], linewidth=1.4, linestyle="dashed", label=policy, **marks)
        if values.reference is not None:
            name = f"reference value {shown_name(repr(values.reference_name))}"
            axes.plot(steps, values.reference, color=COLOURS[2], linewidth=1.4, label=name, **marks)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(axes)


def _draw_frames(figure: Figure, place: Any, name: str, frames: NDArray[np.uint8]) -> None:
    """Some images of the episode side by side, the first and the last among them."""
    count = min(_MOST_FRAMES, len(frames))
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int).tolist()
    for axes, step in zip(figure.add_subfigure(place).subplots(1, count, squeeze=False)[0], chosen, strict=True):
        frame = frames[step]
        # Of stacked frames the last one is shown.
        frame = frame[..., -3:] if frame.shape[-1] % 3 == 0 else frame[..., -1]
        axes.imshow(frame, cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        axes.set_title(f"{name} step {step}".strip(), fontsize=8, parse_math=False)


def _mark_interventions(axes: Axes, view: EpisodeView, *, labelled: bool) -> None:
    """Shades the steps in which a person acted."""
    if view.is_intervention is None:
        return
    edges = np.flatnonzero(np.diff(np.concatenate([[0], view.is_intervention.astype(np.int8), [0]])))
    for begin, end in edges.reshape(-1, 2).tolist():
        axes.axvspan(begin - 0.5, end - 0.5, color="#E69F00", alpha=0.18, linewidth=0)
    if labelled and len(edges):
        axes.set_title("shaded: steps in which a person acted", fontsize=8.5, loc="right", color="#8a6100")


def _legend(axes: Axes) -> None:
    """Beside the panel, so that it hides no curve."""
    handles, labels = axes.get_legend_handles_labels()
    names = [" " for _ in labels]
    legend = axes.legend(handles, names, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    write_names(legend, labels)
