"""What an average came to: a sentence, a table, a picture, of what metrics.json says of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfft.table import write_csv

_KEYS = ("alpha", "members", "decay")
"""What tells candidates from one another, by the kind of the average."""


def average_told(found: Mapping[str, Any]) -> str:
    """Say which average the run's weights are, and what it has gained on validation."""
    metric, chosen, before = found["metric"], _chosen(found), found["before"]
    match found["kind"]:
        case "wise_ft":
            weights = (
                f"wise_ft at alpha {chosen['alpha']:g} (0: the source, 1: fine-tuned), the best of "
                f"{len(found['candidates'])}"
            )
        case "ema":
            weights = f"ema, their moving average at a decay of {chosen['decay']:g}"
        case kind:
            weights = f"{kind} of {', '.join(Path(name).name for name in chosen['members'])}"
    scores = [(f"validation {metric}", chosen["eval"][metric], before["eval"][metric])]
    if found["held_back_metric"] is not None:
        name = f"held-back {found['held_back_metric']}"
        scores.append((name, chosen["held_back"], before["held_back"]))
    gained = [f"{name} {after:.4f}, without it {without:.4f}" for name, after, without in scores]
    return f"The weights are {weights}: {'; '.join(gained)}."


def write_average(folder: Path, found: Mapping[str, Any]) -> None:
    """Write average.csv and average.png: every candidate, and the weights before."""
    key, chosen = _key(found), _chosen(found)
    rows = []
    for one in (*found["candidates"], found["before"]):
        row = {key: _told(one.get(key, "before")), **one["eval"]}
        if found["held_back_metric"] is not None:
            row[f"held-back {found['held_back_metric']}"] = one["held_back"]
        rows.append(row | {"chosen": "yes" if one is chosen else "no"})
    write_csv(folder / "average.csv", rows)
    _draw(folder / "average.png", found)


def _draw(path: Path, found: Mapping[str, Any]) -> None:
    """Draw the task's metric against the held-back one; without that, against the candidates."""
    from matplotlib.figure import Figure

    metric, held_back, chosen = found["metric"], found["held_back_metric"], _chosen(found)
    points = [*found["candidates"], found["before"]]
    if held_back is not None:
        across, label = [one["held_back"] for one in points], f"held-back {held_back}"
    elif found["kind"] == "wise_ft":
        across, label = [one.get("alpha", 1) for one in points], "alpha"
    else:
        across, label = list(range(len(points))), "candidate"
    up = [one["eval"][metric] for one in points]
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    line = "o-" if found["kind"] == "wise_ft" else "o"
    axes.plot(across[:-1], up[:-1], line, color="C0", label=found["kind"])
    axes.plot(across[-1:], up[-1:], "s", mfc="none", color="C1", label="fine-tuned")
    for one, x, y in zip(points, across, up, strict=True):
        if one is chosen:
            axes.plot([x], [y], "o", ms=14, mfc="none", color="C3", label="chosen")
        if one is not found["before"]:
            axes.annotate(_short(one), (x, y), (5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel=label, ylabel=f"validation {metric}")
    axes.legend()
    figure.savefig(path, dpi=120)


def _key(found: Mapping[str, Any]) -> str:
    return next(key for key in _KEYS if key in found["candidates"][0])


def _chosen(found: Mapping[str, Any]) -> Mapping[str, Any]:
    key = _key(found)
    return next(one for one in found["candidates"] if one[key] == found["chosen"])


def _told(value: object) -> str:
    return " + ".join(value) if isinstance(value, list) else str(value)


def _short(candidate: Mapping[str, Any]) -> str:
    """Name a candidate in the picture: alpha, or how many members it has."""
    members = candidate.get("members")
    if members is None:
        return f"{candidate.get('alpha', candidate.get('decay')):g}"
    return Path(members[0]).name if len(members) == 1 else f"{len(members)} together"
