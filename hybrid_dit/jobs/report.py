"""One page about a surgery: `report.html` in its workdir, made from the files there; nothing is computed anew."""

from pathlib import Path

from hybrid_dit.errors import UserError
from hybrid_dit.report import write_report


def run(config, workdir: Path) -> None:
    """Writes `report.html` and says where it is and what it could not show.

    Raises:
        UserError: the workdir holds no stage of a surgery.
    """
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir} does not exist; give the folder of a surgery")
    path, notes = write_report(workdir, max_bytes(config))
    for note in notes:
        print(f"report: {note}")
    print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB), open it in a browser")


def max_bytes(config) -> int:
    """Returns what the page may have."""
    return int(config.report.max_mb * 1e6)
