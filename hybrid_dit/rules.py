"""`(regex, value)` rules over parameter paths "a/b/c": sharding, learning rates, freezing.

Each path must match exactly one rule, as a whole, so that a new parameter can't end up somewhere by accident.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from hybrid_dit.errors import UserError


def assign(rules: Sequence[tuple[str, object]], paths: Iterable[str], kind: str) -> dict[str, object]:
    """Returns {path: value of the one rule that matches it}; `kind` names the rules in errors.

    Raises:
        ValueError: a path matches no rule or several.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    out = {}
    for path in paths:
        hits = [value for pattern, value in compiled if pattern.fullmatch(path)]
        if len(hits) != 1:
            raise ValueError(f"parameter {path} matches {len(hits)} {kind} rules; expected exactly one")
        out[path] = hits[0]
    return out


def parse_numbers(texts: Iterable[str], key: str) -> list[tuple[str, float]]:
    """Returns the rules of settings such as "feature_maps/.*=10"; `key` is the setting's name in errors.

    Raises:
        UserError: no "=", not a regular expression, or not a number of at least 0.
    """
    rules = []
    for text in texts:
        pattern, _, number = text.rpartition("=")
        try:
            re.compile(pattern)
            value = float(number)
        except (re.error, ValueError):
            value = -1.0
        if not pattern or not 0 <= value < float("inf"):
            raise UserError(
                f"--config.{key}: can't read the rule {text!r}; write REGEX=NUMBER, a regular expression over whole "
                "parameter paths and a number of at least 0, for example blocks/.*=1"
            )
        rules.append((pattern, value))
    return rules


def like(tree: Mapping, flat: Mapping[str, object], prefix: str = "") -> dict:
    """`flat` in the structure of `tree`; unlike `tables.unflatten` it keeps empty subtrees (fixed feature maps)."""
    return {
        name: like(value, flat, f"{prefix}{name}/") if isinstance(value, Mapping) else flat[f"{prefix}{name}"]
        for name, value in tree.items()
    }
