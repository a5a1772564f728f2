"""What one block's self-attention costs at every rate, from three sources, and budgets in the same unit.

* `flops`: counted (`hybrid_dit.cost`); needs nothing.
* `timings`: seconds measured on a device, from a CSV file with a header and the columns `label` and `seconds`, one row
  per label (softmax, R2, R4, R8, linear), as the `bench` job writes it. Other columns are ignored.
* `compiled`: cycles that the TPU compiler expects, from the JSON of `--config=configs/plan.py --config.job=select`.
"""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path

from hybrid_dit import cost
from hybrid_dit.convert.files import read_json
from hybrid_dit.errors import UserError

UNITS = {"flops": "FLOPs", "timings": "s", "compiled": "cycles"}
_SUFFIXES = {"flops": {"": 1.0}, "timings": {"s": 1.0, "ms": 1e-3}, "compiled": {"": 1.0}}  # of amounts


def read_timings(path: str | Path, labels: Sequence[str]) -> dict[str, float]:
    """Returns {label: seconds} of a CSV file with columns `label` and `seconds`, in the order of `labels`.

    Raises:
        UserError: no such file, a column or label is missing or there twice, or a time is no positive number.
    """
    file = _file(path, "select.timings", "the CSV that the bench job writes")
    with open(file, newline="") as stream:
        reader = csv.DictReader(stream)
        missing = {"label", "seconds"} - set(reader.fieldnames or ())
        if missing:
            raise UserError(
                f"{file} has no column {' or '.join(sorted(missing))}; its first line must be label,seconds"
            )
        rows = [(row["label"], row["seconds"]) for row in reader]
    twice = {label for label, _ in rows if [other for other, _ in rows].count(label) > 1}
    if twice:
        raise UserError(f"{file} has several rows for {', '.join(sorted(twice))}")
    return _pick(file, dict(rows), labels)


def read_estimate(path: str | Path, labels: Sequence[str], tokens: int) -> dict[str, float]:
    """Returns {label: cycles} of a file that `plan` wrote for `--config.job=select`, in the order of `labels`.

    Raises:
        UserError: no such file, it is for a video of another size, or it lacks a label.
    """
    file = _file(path, "select.estimate", "what --config=configs/plan.py --config.job=select writes")
    report = read_json(file)
    if report.get("unit") != "cycles" or not isinstance(report.get("costs"), dict):
        raise UserError(f"{file} holds no costs; make it with --config=configs/plan.py --config.job=select")
    if report.get("tokens") != tokens:
        raise UserError(
            f"{file} is for videos of {report.get('tokens')} tokens, this run's have {tokens}; make it anew"
        )
    return _pick(file, report["costs"], labels)


def parse_budget(text: str | Real, block_costs: Mapping[str, Real], blocks: int, kind: str) -> Real:
    """Returns a budget for the self-attention of all blocks, in the unit of the costs.

    Args:
        text: a name (15R4), a share of softmax's cost up to 1, or an amount: FLOPs or cycles as a number above 1,
            seconds with their unit (0.3s, 40ms).
        block_costs: {label: cost of one block}, softmax among them.
        blocks: number of blocks.
        kind: a key of `UNITS`.
    """
    units = _SUFFIXES[kind]
    match = re.fullmatch(r"(.*?)\s*(ms|s|)", str(text).strip())
    try:
        number = float(match[1])
    except ValueError:
        return cost.named_budget(str(text), block_costs, blocks)
    allowed = f"a name like 15R4, a share up to 1, or {'0.3s or 40ms' if 's' in units else UNITS[kind]}"
    if not number > 0 or not math.isfinite(number):
        raise UserError(f"select.budget={text} must be positive: {allowed}")
    if not match[2] and number <= 1:
        return number * blocks * block_costs["softmax"]
    if match[2] not in units:
        raise UserError(f"select.budget={text} is not in the unit of select.costs={kind}: write {allowed}")
    return number * units[match[2]]


def _file(path: str | Path, key: str, what: str) -> Path:
    if not str(path):
        raise UserError(f"set --config.{key} to {what}")
    if not Path(path).is_file():
        raise UserError(f"{key}={path} does not exist; it should be {what}")
    return Path(path)


def _pick(file: Path, costs: Mapping[str, object], labels: Sequence[str]) -> dict[str, float]:
    missing = [label for label in labels if label not in costs]
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}; it has {', '.join(costs)}")
    out = {}
    for label in labels:
        try:
            out[label] = float(costs[label])
        except (TypeError, ValueError):
            out[label] = math.nan
        if not (out[label] > 0 and math.isfinite(out[label])):
            raise UserError(f"{file}: the cost of {label} is {costs[label]!r}; expected a positive number")
    return out
