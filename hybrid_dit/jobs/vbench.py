"""Where an evaluation with VBench or VBench-2.0 stands: videos still missing, and the table of its results."""

from pathlib import Path

from hybrid_dit import pictures
from hybrid_dit.atomic import write_text
from hybrid_dit.errors import UserError
from hybrid_dit.vbench import layout, results
from hybrid_dit.vbench.facts import Suite, get_suite

VARIANTS = ("teacher", "finetuned")


def run(config, workdir: Path) -> int:
    """Prints what is missing of every variant's videos, and the table of all results; writes the latter.

    Returns:
        0, or 1 if the videos of a variant are not exactly what the suite expects.
    """
    cfg = config.suite
    suite = get_suite(cfg.name)
    progress = check(cfg, suite, workdir) if cfg.prompts else {}
    models = find_results(cfg, suite, workdir)
    if not progress and not models:
        raise UserError(
            "nothing to check and no results; --config.suite.prompts names the prompts, and results are looked for in "
            f"{workdir}/sample_<variant>/{suite.name}_results and at --config.suite.results"
        )
    for variant, found in progress.items():
        print(f"{suite.title}, {variant}: {found}")
    if models:
        folder = workdir / suite.name
        table = results.to_markdown(suite, models)
        write_text(folder / "scores.md", table)
        write_text(folder / "scores.csv", results.to_csv(suite, models))
        percent = {
            model: {name: 100 * score for name, score in (scores | results.summarise(suite, scores)).items()}
            for model, scores in models.items()
        }
        pictures.score_bars(folder / "scores.png", percent, "score in percent, groups and total last", suite.title)
        print(f"{table}\ntable and picture: {folder}")
    return 0 if all(found.complete for found in progress.values()) else 1


def check(cfg, suite: Suite, workdir: Path) -> dict[str, layout.Progress]:
    """Returns variant -> what is there of its videos.

    Raises:
        UserError: there are none of either variant, or what is wrong with the prompts.
    """
    expected = layout.videos_of(cfg)
    known = layout.layout(suite, prompts := layout.read_suite(suite, cfg.prompts), [p.text for p in prompts])
    folders = {variant: workdir / f"sample_{variant}" / suite.name for variant in VARIANTS}
    found = {v: layout.check(folder, expected, known) for v, folder in folders.items() if folder.is_dir()}
    if not found:
        raise UserError(
            f"no videos in {' or '.join(map(str, folders.values()))}; sample them with --config=configs/sample.py "
            f"--config.suite.name={suite.name} and the same prompts"
        )
    return found


def find_results(cfg, suite: Suite, workdir: Path) -> dict[str, dict[str, float]]:
    """Returns model -> dimension -> raw score: of the variants that have results, then those the config names.

    Raises:
        UserError: an entry that is not NAME=PATH, a name twice, or what is wrong with a file.
    """
    paths = {}
    for variant in VARIANTS:
        folder = workdir / f"sample_{variant}" / f"{suite.name}_results"
        if folder.is_dir():
            paths[variant] = folder
    for entry in cfg.results:
        name, equals, path = entry.partition("=")
        if not equals or not name or not path or name in paths:
            raise UserError(f"suite.results: {entry!r} must be NAME=PATH with a name not used yet ({', '.join(paths)})")
        paths[name] = Path(path)
    return {name: results.read_results(suite, path) for name, path in paths.items()}
