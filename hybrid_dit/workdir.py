"""The folder a run writes to: one subfolder per stage, with the settings it was made with and a mark when complete.

Running a command again continues it: complete stages are skipped, incomplete ones go on. A stage made with other
settings is an error that shows the difference, never silently reused; settings that nothing was made with yet don't
count. With several processes, the first looks and writes, and tells the others: a file that one machine has written
another one may not see yet.
"""

import json
from pathlib import Path

from hybrid_dit import environment, processes
from hybrid_dit.atomic import write_json
from hybrid_dit.errors import UserError

# Sections of the config that decide a stage's outputs: its own and those of the stages before it.
SECTIONS = {
    "data": ("build_data",),
    "distill": ("model", "prompts", "distill"),
    "select": ("model", "prompts", "distill", "select"),
    "finetune": ("model", "prompts", "distill", "select", "finetune"),
    "export": ("model", "prompts", "distill", "select", "finetune"),
    "evaluate": ("model", "prompts", "distill", "select", "finetune", "evaluate"),
    "bench": ("model", "distill", "bench"),
    "sample_teacher": ("model", "sample"),
    "sample_finetuned": ("model", "prompts", "distill", "select", "finetune", "sample"),
}

# Sections that decide a stage's outputs, too, but that the stages after it need not be told again.
OWN = {"finetune": ("data",)}

# Settings that say how a stage runs and what it shows, not what it computes (but for rounding): they may change when it
# is continued.
HOW = {
    "finetune": ("accumulate", "remat", "save_every", "keep", "sample_every", "sample_prompts", "profile"),
    "data": ("text_rows", "max_bad", "threads", "ahead"),  # the first two: a run that bad samples ended can go on
    "bench": ("what", "videos", "rates", "models", "backward", "dtypes", "backends"),
}

# Stages that several runs in one workdir share out among themselves.
SHARED = ("data", "sample_teacher", "sample_finetuned")


class Stage:
    """One stage of a run.

    Attributes:
        folder: `workdir/name`, created.
    """

    def __init__(self, workdir: Path, name: str, config, later: bool = False):
        """Opens the stage's folder.

        Args:
            workdir: of the run.
            name: of the stage.
            config: of the run.
            later: whether a later stage asks, whose command needs no settings of sections in `OWN`.

        Raises:
            UserError: the folder was made with other settings.
        """
        self.folder = workdir / name
        self._name, self._uses_model = name, "model" in SECTIONS[name]
        sections = SECTIONS[name] + (() if later else OWN.get(name, ()))
        settings = {"seed": config.seed, **{section: config[section].to_dict() for section in sections}}
        settings = _without_how(json.loads(json.dumps(settings)))  # tuples become lists, as in the file
        processes.on_main(self._open, settings, later)

    def _open(self, settings: dict, later: bool) -> None:
        file = self.folder / "settings.json"
        if file.is_file():
            there = _without_how(json.loads(file.read_text()))
            # Of sections that only one side has: asked by a later stage, or written by an earlier version.
            left_out = {section for section in OWN.get(self._name, ()) if section not in there.keys() & settings.keys()}
            there, here = ({k: v for k, v in side.items() if k not in left_out} for side in (there, settings))
            changed = _difference(there, here)
            replaceable = not later and self._name not in SHARED
            if changed and replaceable and list(self.folder.iterdir()) == [file]:
                write_json(file, settings)  # a run that was refused for its settings: nothing was made with them
            elif changed:
                raise UserError(
                    f"{self.folder} was made with other settings:\n  " + "\n  ".join(changed) + "\n"
                    "Use another --workdir, or delete that folder to make it anew."
                )
        else:
            write_json(file, settings)

    @property
    def done(self) -> bool:
        """Whether the stage is complete."""
        return processes.on_main((self.folder / "done.json").is_file)

    def finish(self, **summary) -> None:
        """Marks the stage as complete; everything else must have been written before. `summary` is kept in the mark.

        Where a model was at work, `environment.json` says with which versions and on which devices; a data set's bytes
        depend on its settings alone.
        """
        processes.on_main(self._finish, summary)

    def _finish(self, summary: dict) -> None:
        if self._uses_model:
            write_json(self.folder / "environment.json", environment.describe())
        write_json(self.folder / "done.json", summary)


def is_done(workdir: Path, name: str, config, later: bool = False) -> bool:
    """Returns whether a stage is complete, without creating its folder; `later` as in `Stage`.

    Raises:
        UserError: the stage was made with other settings.
    """
    return processes.on_main((workdir / name / "settings.json").is_file) and Stage(workdir, name, config, later).done


def require(workdir: Path, name: str, config) -> Path:
    """Returns the folder of an earlier stage, which must be complete.

    Raises:
        UserError: it isn't (says how to make it), or it was made with other settings.
    """
    if not is_done(workdir, name, config, later=True):
        raise UserError(f"{workdir / name} is not complete; run --config=configs/{name}.py with this --workdir first")
    return workdir / name


def _without_how(settings: dict) -> dict:
    for section, names in HOW.items():
        for name in names:
            settings.get(section, {}).pop(name, None)
    return settings


def _difference(there: dict, here: dict, prefix: str = "") -> list[str]:
    lines = []
    for key in sorted(there.keys() | here.keys()):
        name = f"{prefix}{key}"
        if isinstance(there.get(key), dict) and isinstance(here.get(key), dict):
            lines += _difference(there[key], here[key], f"{name}.")
        elif there.get(key) != here.get(key):
            lines.append(f"{name}: {there.get(key)!r} there, {here.get(key)!r} in this command")
    return lines
