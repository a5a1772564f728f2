"""Conversion killed at any moment leaves a whole folder or none, and the same command then completes it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pipelines import random_like

from hybrid_dit.convert import commands, sources, tables
from hybrid_dit.convert.files import write_safetensors
from hybrid_dit.models.wan import WanConfig

DIT = WanConfig(dim=128, num_heads=1, ffn_dim=256, num_layers=6, in_channels=4, text_dim=8, freq_dim=16)
# JAX doesn't survive a fork once it has computed something, so the parent only starts, kills and looks.
PROGRAM = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from hybrid_dit.convert import commands, sources
from hybrid_dit.convert.params import to_tree
source, target, reference, what = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]

def convert():
    if what == "import":
        commands.import_weights(source, target)
    else:
        commands.export_weights(source, target, "diffusers")

def same():
    from hybrid_dit.convert import tables
    here, there = (tables.flatten(to_tree(sources.open_part(f).params)) for f in (target, reference))
    assert here.keys() == there.keys()
    assert all(here[name].tobytes() == there[name].tobytes() for name in there)

def child(function):
    pid = os.fork()
    if pid == 0:
        try:
            sys.stdout = open(os.devnull, "w")
            function()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid

def succeeds(function):
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child(function), 0)[1]) == 0
    return time.monotonic() - began

seconds = succeeds(convert)
shutil.rmtree(target)
rng, killed = random.Random(0), []
for i in range(10):
    pid = child(convert)
    time.sleep(seconds * (i + rng.random()) / 10)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    killed.append(sorted(f.name for f in target.parent.iterdir()))
    if target.exists():
        succeeds(same)
        shutil.rmtree(target)
succeeds(convert)
succeeds(same)
print(json.dumps({"killed": killed, "left": sorted(f.name for f in target.parent.iterdir())}))
"""


@pytest.mark.parametrize("what", ["import", "export"])
def test_killed_at_ten_moments(tmp_path, what):
    tree = random_like(sources.abstract(DIT), np.random.default_rng(0))
    table = sources.entries(DIT, (), "wan", tree)
    write_safetensors(tmp_path / "in.safetensors", dict(tables.export_tree(table, tree)), {})
    commands.import_weights(tmp_path / "in.safetensors", tmp_path / "reference")
    source = tmp_path / ("in.safetensors" if what == "import" else "reference")
    (tmp_path / "place").mkdir()
    arguments = [str(source), str(tmp_path / "place" / "out"), str(tmp_path / "reference"), what]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    assert all(set(names) <= {"out", ".out.incomplete"} for names in told["killed"])
    assert [".out.incomplete"] in told["killed"], "no kill came while something was being written"
    assert told["left"] == ["out"]
