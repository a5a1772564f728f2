"""A run's settings against the defaults they were changed from, and the commands that make it again."""

import dataclasses
import importlib.util
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMON = Path(__file__).parents[2] / "configs" / "common.py"


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run.

    Attributes:
        models: whose defaults are nearest (tiny, wan_1_3b, ...), several if alike; empty if defaults are not at hand.
        values: "section.name" -> value.
        changed: "section.name" -> (default, value), of settings that the configs know.
        unknown: names that the configs don't know, such as those of an older version.
    """

    models: tuple[str, ...]
    values: Mapping[str, Any]
    changed: Mapping[str, tuple[Any, Any]]
    unknown: tuple[str, ...]


def load_defaults(common: Path = COMMON) -> dict[str, dict[str, Any]]:
    """Returns model -> {"section.name": default}; empty if there are no configs beside the package."""
    if not common.is_file():
        return {}
    spec = importlib.util.spec_from_file_location("hybrid_dit_config_common", common)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {model: flatten(module.get_config("surgery", model).to_dict()) for model in module.MODELS}


def compare(settings: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Compares a run's settings (sections as in settings.json) to the nearest model's defaults."""
    values = flatten(settings)
    if not defaults:
        return Settings((), values, {}, ())

    def changes(model: str) -> dict[str, tuple[Any, Any]]:
        default = defaults[model]
        return {key: (default[key], v) for key, v in values.items() if key in default and default[key] != v}

    fewest = min(len(changes(model)) for model in defaults)
    models = tuple(model for model in defaults if len(changes(model)) == fewest)
    return Settings(models, values, changes(models[0]), tuple(key for key in values if key not in defaults[models[0]]))


def commands(settings: Settings, workdir: Path) -> list[str]:
    """Returns the shell commands that repeat a surgery with these settings, and that make its report."""
    model = f":{settings.models[0]}" if settings.models and settings.models[0] != "tiny" else ""
    folder = shlex.quote(f"--workdir={workdir}")
    changed = [shlex.quote(f"--config.{key}={argument(value)}") for key, (_, value) in settings.changed.items()]
    main = "python -m hybrid_dit.main --config=configs"
    return [" \\\n  ".join([f"{main}/surgery.py{model}", folder, *changed]), f"{main}/report.py {folder}"]


def argument(value: Any) -> str:
    """Returns a setting as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(argument, value)) if isinstance(value, list | tuple) else str(value)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"section.name": value}; tuples become lists, as JSON has them."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
