"""What VBench and VBench-2.0 ask for and how they add up scores.

Sources, as of March 2026 in github.com/Vchitect/VBench: counts and names `prompts/README.md`, `vbench/__init__.py`,
`VBench-2.0/prompts/README.md`, `VBench-2.0/vbench2/__init__.py`; normalisation and weights `scripts/constant.py`,
`scripts/cal_final_score.py` and their namesakes in `VBench-2.0`. Papers: arXiv:2311.17982 and arXiv:2503.21755.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from hybrid_dit.errors import UserError


class Dimension(NamedTuple):
    """How a raw score enters its group: weight · (raw − low) / (high − low), over the sum of the weights."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


class Group(NamedTuple):
    """Dimensions with one common score, and its weight in the total."""

    weight: float
    dimensions: Mapping[str, Dimension]


@dataclasses.dataclass(frozen=True)
class Suite:
    """One benchmark.

    Attributes:
        name: how the config calls it.
        title: how people call it.
        groups: its scores; every dimension is in exactly one.
        samples: videos per prompt.
        more: dimension -> videos per prompt, where it differs.
        folders: videos lie in one folder per dimension, not in one for all.
        cut: characters of the prompt that file names keep; None keeps all.
    """

    name: str
    title: str
    groups: Mapping[str, Group]
    samples: int
    more: Mapping[str, int]
    folders: bool
    cut: int | None

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """All dimensions, in the order of the table."""
        return {name: dimension for group in self.groups.values() for name, dimension in group.dimensions.items()}

    def samples_of(self, dimension: str) -> int:
        """Videos of each prompt of a dimension."""
        return self.more.get(dimension, self.samples)


VBENCH = Suite(
    name="vbench",
    title="VBench",
    groups=MappingProxyType(
        {
            "quality": Group(
                4,
                {
                    "subject_consistency": Dimension(low=0.1462),
                    "background_consistency": Dimension(low=0.2615),
                    "temporal_flickering": Dimension(low=0.6293),
                    "motion_smoothness": Dimension(low=0.706, high=0.9975),
                    "dynamic_degree": Dimension(weight=0.5),
                    "aesthetic_quality": Dimension(),
                    "imaging_quality": Dimension(),
                },
            ),
            "semantic": Group(
                1,
                {
                    "object_class": Dimension(),
                    "multiple_objects": Dimension(),
                    "human_action": Dimension(),
                    "color": Dimension(),
                    "spatial_relationship": Dimension(),
                    "scene": Dimension(high=0.8222),
                    "appearance_style": Dimension(low=0.0009, high=0.2855),
                    "temporal_style": Dimension(high=0.364),
                    "overall_consistency": Dimension(high=0.364),
                },
            ),
        }
    ),
    samples=5,
    more=MappingProxyType({"temporal_flickering": 25}),  # its static filter throws away most of them
    folders=False,
    cut=None,
)


def _plain(*names: str) -> Group:
    return Group(1, {name: Dimension() for name in names})


VBENCH2 = Suite(
    name="vbench2",
    title="VBench-2.0",
    groups=MappingProxyType(
        {
            "creativity": _plain("Composition", "Diversity"),
            "commonsense": _plain("Instance_Preservation", "Motion_Rationality"),
            "controllability": _plain(
                "Camera_Motion",
                "Complex_Landscape",
                "Complex_Plot",
                "Dynamic_Attribute",
                "Dynamic_Spatial_Relationship",
                "Human_Interaction",
                "Motion_Order_Understanding",
            ),
            "human_fidelity": _plain("Human_Anatomy", "Human_Clothes", "Human_Identity"),
            "physics": _plain("Material", "Mechanics", "Multi-View_Consistency", "Thermotics"),
        }
    ),
    samples=3,
    more=MappingProxyType({"Diversity": 20}),
    folders=True,
    cut=180,
)

SUITES = MappingProxyType({suite.name: suite for suite in (VBENCH, VBENCH2)})


def get_suite(name: str) -> Suite:
    """Returns the suite of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SUITES:
        raise UserError(f"suite.name={name!r} is unknown; choose one of {', '.join(SUITES)}")
    return SUITES[name]
