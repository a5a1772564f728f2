"""The paper's tables, as rows to score and claims to check; blocks are eighths here, thirtieths there."""

import dataclasses
from collections.abc import Sequence

from study import UNDISTILLED, Row, Study


@dataclasses.dataclass(frozen=True)
class Claim:
    """`better` has more in `column` than `worse`, says the paper (or design, where `source` says so)."""

    better: str
    worse: str
    source: str
    column: str = "total"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows, claims, and the extra columns to show beside the score."""

    title: str
    rows: Sequence[Row]
    claims: Sequence[Claim]
    columns: Sequence[str] = ()


def distillation(study: Study) -> Table:
    """With and without stage 1 (paper: 15 Linear 59.7 -> 78.9, 20R8 77.3 -> 80.0)."""
    rows, claims = [], []
    for name, count, label in (("4 linear", 4, "linear"), ("5R8", 5, "R8")):
        choose = study.homogeneous(count, label)
        rows += [Row(f"{name}, not distilled", choose, maps=UNDISTILLED), Row(f"{name}, distilled", choose)]
        claims.append(Claim(f"{name}, distilled", f"{name}, not distilled", "distillation on/off"))
    claims.append(Claim("5R8, distilled", "4 linear, distilled", "20R8 80.0 against 15 linear 78.9"))
    return Table("Distillation on and off", rows, claims)


def rates(study: Study) -> Table:
    """Rates 2, 4, 8 in 50, 63 and 88% of the blocks."""
    counts, labels = (4, 5, 7), ("R2", "R4", "R8")
    rows = [Row(f"{n}{label}", study.homogeneous(n, label)) for n in counts for label in labels]
    claims = [Claim(f"{n}{a}", f"{n}{b}", "more softmax tokens") for n in counts for a, b in zip(labels, labels[1:])]
    more = list(zip(counts, counts[1:]))
    claims += [Claim(f"{a}{label}", f"{b}{label}", "fewer blocks converted") for label in labels for a, b in more]
    return Table("Rates and shares of blocks, one rate per model", rows, claims)


def selection(study: Study) -> Table:
    """Heterogeneous against homogeneous at four budgets (paper, all fine-tuned: 15R4, 20R4, 20R8, 25R4)."""
    rows, claims = [], []
    for steps in (0, 200):
        for budget in ("4R4", "5R4", "5R8", "7R4"):
            count, label, tuned = int(budget[0]), budget[1:], f", {steps} steps of fine-tuning" if steps else ""
            mixed, single = f"{budget}, knapsack{tuned}", f"{budget}, one rate{tuned}"
            rows.append(Row(single, study.homogeneous(count, label), finetune=steps))
            rows.append(Row(mixed, study.heterogeneous(budget), finetune=steps))
            claims.append(Claim(mixed, single, "heterogeneous against homogeneous"))
    return Table("One rate per block by the knapsack, against one rate per model", rows, claims)


def loss(study: Study) -> Table:
    """Value against attention distillation (paper, 20R8: 80.0 / 79.5, dynamic degree 66.1 / 37.5)."""
    choose, value, attention = study.homogeneous(5, "R8"), "5R8, value loss", "5R8, attention loss"
    rows = [Row(value, choose), Row(attention, choose, {"loss": "attention"})]
    claims = [Claim(value, attention, "total 80.0 against 79.5")]
    claims.append(Claim(value, attention, "dynamic degree 66.1 against 37.5", "motion"))
    return Table("Value and attention distillation", rows, claims, ("direction", "motion"))


def feature_maps(study: Study) -> Table:
    """Degree and layers of the feature map (paper: all within 1.3 points of each other)."""
    rows = []
    for degree, layers in ((6, 3), (4, 2), (3, 2), (2, 2)):
        changed = {} if (degree, layers) == (2, 2) else {"degree": degree, "layers": layers}
        for count in (3, 4, 5):
            rows.append(Row(f"{count}R8, P = {degree}, {layers} layers", study.homogeneous(count, "R8"), changed))
    pairs = [(f"{n}R8, P = 6, 3 layers", f"{n}R8, P = 2, 2 layers") for n in (3, 4, 5)]
    return Table("Degree and layers of the feature map", rows, [Claim(a, b, "larger maps") for a, b in pairs])


def finetuning(study: Study) -> Table:
    """Fine-tuning steps (paper: 400 to 1,000)."""
    choose, steps = study.homogeneous(5, "R8"), (0, 50, 100, 200, 400)
    rows = [Row(f"5R8, {n} steps", choose, finetune=n) for n in steps]
    claims = [Claim(f"5R8, {b} steps", f"5R8, {a} steps", "more fine-tuning") for a, b in zip(steps, steps[1:])]
    return Table("Steps of fine-tuning", rows, claims, ("motion",))


def stabiliser(study: Study) -> Table:
    """c_i as the maximum (the paper) or the log-sum-exp (ours: it lets library kernels serve)."""
    rows, claims = [], []
    for name in ("4R4", "5R8"):
        choose = study.homogeneous(int(name[0]), name[1:])
        rows += [Row(f"{name}, max", choose), Row(f"{name}, lse", choose, {"stabiliser": "lse"})]
        claims.append(Claim(f"{name}, max", f"{name}, lse", "the paper's choice against ours"))
    return Table("What stabilises the softmax part", rows, claims)


def pattern(study: Study) -> Table:
    """Plain and shifted stride, at equal cost; 8 tokens a row, so that the plain one takes whole columns."""
    rows, claims = [], []
    for label in ("R2", "R4", "R8"):
        choose = study.homogeneous(8, label)
        rows += [Row(f"8{label}, stride", choose), Row(f"8{label}, lattice", choose, {"pattern": "lattice"})]
        claims.append(Claim(f"8{label}, lattice", f"8{label}, stride", "ours: shifted tokens are better"))
    return Table("Which tokens keep softmax", rows, claims)


TABLES = {
    "distillation": distillation,
    "rates": rates,
    "selection": selection,
    "loss": loss,
    "feature_maps": feature_maps,
    "finetuning": finetuning,
    "stabiliser": stabiliser,
    "pattern": pattern,
}

# Distillations whose errors alone are compared, by rate: name -> changed settings.
ERRORS = {
    "value loss, P = 2, 2 layers, max, stride": {},
    "attention loss": {"loss": "attention"},
    "P = 3": {"degree": 3, "layers": 2},
    "P = 4": {"degree": 4, "layers": 2},
    "P = 6, 3 layers": {"degree": 6, "layers": 3},
    "lse": {"stabiliser": "lse"},
    "lattice": {"pattern": "lattice"},
}
WIDTHS = (7, 8, 9, 10)  # tokens per row; R divides 8 only, and 10 by 2
