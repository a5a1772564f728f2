"""Prompt files: one prompt a line."""

from pathlib import Path

from hybrid_dit.errors import UserError


def read_prompts(path: str | Path) -> list[str]:
    """Returns the non-empty lines of a UTF-8 text file, stripped.

    Raises:
        UserError: no path was given, the file is missing, no text, or has no prompt in it.
    """
    if not str(path):
        raise UserError("no prompt file given; set --config.prompts.train and --config.prompts.held_out")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # alone: texts hold other breaks, U+2028 say
    except OSError as error:
        raise UserError(f"prompt file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompt file {path} has no prompt in it; write one a line")
    return prompts
