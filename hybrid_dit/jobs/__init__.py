"""Jobs: what `python -m hybrid_dit.main` runs, one module each, with a function `run(config, workdir)`."""
