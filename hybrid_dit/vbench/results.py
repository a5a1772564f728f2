"""The result files of VBench and VBench-2.0, added up as their leaderboards do, in one table.

Both write `*_eval_results.json`: {dimension: [score, [one entry per video]]}, one file for all dimensions or several.
"""

import csv
import io
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from hybrid_dit.convert.json_file import shown
from hybrid_dit.errors import UserError
from hybrid_dit.vbench.facts import Suite

TOTAL = "total"


def read_results(suite: Suite, path: str | Path) -> dict[str, float]:
    """Returns {dimension: raw score} from a result file, a folder of them (searched through), or a zip of one.

    Raises:
        UserError: nothing there, a dimension with two different scores or one of another suite, or a score that is no
            number from 0 to 1.
    """
    found: dict[str, tuple[float, str]] = {}
    for name, content in _files(Path(path)):
        try:
            entries = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name} is not valid JSON: {shown(error)}") from error
        if not isinstance(entries, dict):  # *_full_info.json, which lies beside it, is a list
            continue
        for dimension, value in entries.items():
            if dimension not in suite.dimensions:
                raise UserError(f"{name}: {suite.title} has no dimension {shown(dimension)}")
            score = _score(value, dimension, name)
            if found.setdefault(dimension, (score, name))[0] != score:
                raise UserError(
                    f"{dimension} is {found[dimension][0]:g} in {found[dimension][1]} and {score:g} in {name}; "
                    "remove the one that is out of date"
                )
    if not found:
        raise UserError(f"{path} has no results of {suite.title} in it (*_eval_results.json)")
    return {dimension: found[dimension][0] for dimension in suite.dimensions if dimension in found}


def summarise(suite: Suite, scores: Mapping[str, float]) -> dict[str, float]:
    """Returns {group: score, ..., "total": score} of raw scores; groups with a missing dimension are left out.

    (The suites' own scripts count a missing dimension as 0.)
    """
    groups = {}
    for name, group in suite.groups.items():
        if all(dimension in scores for dimension in group.dimensions):
            terms = (d.weight * normalised(suite, key, scores[key]) for key, d in group.dimensions.items())
            groups[name] = math.fsum(terms) / math.fsum(d.weight for d in group.dimensions.values())
    if len(groups) == len(suite.groups):
        weights = {name: group.weight for name, group in suite.groups.items()}
        groups[TOTAL] = math.fsum(weights[n] * groups[n] for n in weights) / math.fsum(weights.values())
    return groups


def normalised(suite: Suite, dimension: str, score: float) -> float:
    """Returns (score − low) / (high − low); a score beyond the suite's bounds is not clipped."""
    low, high, _ = suite.dimensions[dimension]
    return (score - low) / (high - low)


def to_csv(suite: Suite, models: Mapping[str, Mapping[str, float]]) -> str:
    """Returns one line per dimension, group and total: raw and normalised score of every model, 0 to 1.

    Args:
        suite: whose scores.
        models: model -> dimension -> raw score.
    """
    rows = []
    for label, group, dimension in _rows(suite):
        row = {"score": label, "group": group}
        for model, scores in models.items():
            value = scores.get(dimension) if dimension else None
            summary = summarise(suite, scores).get(label) if not dimension else None
            if dimension and value is not None:
                summary = normalised(suite, dimension, value)
            row |= {model: value, f"{model}_normalised": summary}
        rows.append(row)
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def to_markdown(suite: Suite, models: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the table for people, in percent: dimensions as measured, groups and total as added up."""
    lines = [f"| {suite.title} | {' | '.join(models)} |", "|---|" + "---:|" * len(models)]
    sums = {model: summarise(suite, scores) for model, scores in models.items()}
    for label, _, dimension in _rows(suite):
        values = [(models[m].get(dimension) if dimension else sums[m].get(label)) for m in models]
        cells = ["–" if value is None else f"{100 * value:.2f}" for value in values]
        name = label.replace("_", " ")
        if not dimension:
            name, cells = f"**{name}**", [f"**{cell}**" for cell in cells]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    missing = {model: [d for d in suite.dimensions if d not in scores] for model, scores in models.items()}
    notes = [f"{model} has no {', '.join(names)}, hence no total." for model, names in missing.items() if names]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _rows(suite: Suite) -> Iterator[tuple[str, str, str]]:
    """Yields (label, group, dimension): each group's dimensions and then its score, at last the total."""
    for name, group in suite.groups.items():
        for dimension in group.dimensions:
            yield dimension, name, dimension
        yield name, name, ""
    yield TOTAL, "", ""


def _score(value: object, dimension: str, where: str) -> float:
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, bool) or not isinstance(first, int | float) or not 0 <= first <= 1:  # NaN neither
        raise UserError(f"{where}: the score of {dimension} is {shown(first)}, expected a number from 0 to 1")
    return float(first)


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the JSON files at a path."""
    try:
        if path.is_dir():
            for file in sorted(path.rglob("*.json")):
                yield str(file), file.read_bytes()
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in sorted(archive.namelist()):
                    if name.endswith(".json") and not name.startswith("__MACOSX"):
                        yield f"{path}/{name}", archive.read(name)
        else:
            yield str(path), path.read_bytes()
    except OSError as error:
        raise UserError(f"results {path}: {error.strerror}") from error
    except zipfile.BadZipFile as error:
        raise UserError(f"results {path}: {error}") from error
