"""The command line: `--config=FILE.py[:MODEL] --workdir=DIR [--config.x.y=value ...]`, with errors a person can act on.

A config file defines `get_config` (with the model's name as its argument, if it has one), which returns a ConfigDict.
Overrides are read as the type of the value they replace; a tuple is written a,b,c. A config with a
`default_workdir` needs no --workdir.
"""

import ast
import difflib
import importlib.util
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from hybrid_dit.errors import UserError

USAGE = "python -m hybrid_dit.main --config=configs/JOB.py[:MODEL] --workdir=DIR [--config.x.y=value ...]"


def parse(argv: Sequence[str]) -> tuple[ConfigDict, Path]:
    """Returns (locked config, workdir) from the arguments after the program's name.

    Raises:
        UserError: an unknown option, config key, model or file, a value of the wrong type, or no config or workdir.
    """
    options: dict[str, str] = {}
    rest = list(argv)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise UserError(f"unexpected argument {name!r}; options look like --config.seed=1")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"option {name} has no value; write {name}=VALUE")
            value = rest.pop(0)
        options[name[2:]] = value
    unknown = [name for name in options if name not in ("config", "workdir") and not name.startswith("config.")]
    if unknown:
        hint = _nearest(unknown[0], {"config": "--config", "workdir": "--workdir"})
        raise UserError(f"unknown option --{unknown[0]}{hint}; usage: {USAGE}")
    if not options.get("config"):
        raise UserError(f"option --config is missing; usage: {USAGE}")
    config = load(options.pop("config"))
    workdir = options.pop("workdir", "") or config.get("default_workdir")
    if not workdir:
        raise UserError(f"option --workdir is missing; usage: {USAGE}")
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; give a folder")
    for name, value in options.items():
        override(config, name.removeprefix("config."), value)
    return config.lock(), workdir


def load(path: str) -> ConfigDict:
    """Returns the config of `FILE.py` or `FILE.py:MODEL`.

    Raises:
        UserError: the file is missing or fails, or it doesn't know the model.
    """
    name, _, model = path.partition(":")
    file = Path(name).resolve()
    if not file.is_file():
        others = {other.stem: other.name for other in file.parent.glob("*.py")}
        raise UserError(f"config file {name} does not exist{_nearest(file.stem, others)}")
    spec = importlib.util.spec_from_file_location(f"hybrid_dit_config_{file.stem}", file)
    if spec is None:
        raise UserError(f"config file {name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.parent))  # configs import what they share as `configs.common`
    try:
        spec.loader.exec_module(module)
        if model and not inspect.signature(module.get_config).parameters:
            raise UserError(f"config file {name} has one model alone; leave out :{model}")
        return module.get_config(*[model] if model else [])
    except ValueError as error:  # what `get_config` raises for a model that it doesn't know
        raise UserError(f"--config={path}: {error}") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config file {name} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.parent.parent))


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets `config.a.b` for key "a.b", with `text` read as the type of the value there.

    Raises:
        UserError: unknown key (names the nearest), a section instead of a key, or text of another type.
    """
    keys = _flatten(config)
    if key not in keys:
        inside = [path for path in keys if path.startswith(f"{key}.")]
        if inside:
            raise UserError(f"--config.{key} is a section; set one of its keys, such as --config.{inside[0]}")
        ends = {path.rsplit(".", 1)[-1]: path for path in keys}  # the right key in the wrong section
        hint = _nearest(key, {path: path for path in keys}) or _nearest(key.rsplit(".", 1)[-1], ends)
        raise UserError(f"unknown config key --config.{key}{hint}")
    *sections, name = key.split(".")
    node = config
    for section in sections:
        node = node[section]
    node[name] = _read(text, keys[key], key)


def _read(text: str, like, key: str):
    """Returns `text` as a value of the type of `like`."""
    try:
        if isinstance(like, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(like, tuple):
            if text.strip()[:1] in ("(", "["):
                parts = ast.literal_eval(text)
                parts = [str(part) for part in parts]
            else:
                parts = [part.strip() for part in text.split(",") if part.strip()]
            return tuple(_read(part, like[0] if like else "", key) for part in parts)
        value = type(like)(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(text)
        return value
    except (KeyError, ValueError, TypeError, SyntaxError) as error:
        kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(like), "a list such as a,b,c")
        raise UserError(f"--config.{key}={text} is not {kind} (its default is {like!r})") from error


def _flatten(config: ConfigDict, prefix: str = "") -> dict:
    flat = {}
    for name, value in config.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {prefix + name: value}
    return flat


def _nearest(word: str, words: Mapping[str, str]) -> str:
    """Returns "; did you mean ...?" with the value of the key most like `word`, or "" if none is like it."""
    near = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {words[near[0]]}?" if near else ""
