import platform
import subprocess
import sys

import jax

from hybrid_dit import environment


def test_versions_and_devices_are_those_of_this_process():
    count = jax.device_count()  # starts JAX
    about = environment.describe()
    assert about["python"] == platform.python_version() and about["jax"] == jax.__version__
    assert about["devices"] == f"{count} x {jax.devices()[0].device_kind}" and about["processes"] == "1"
    assert all(isinstance(text, str) for text in about.values())


def test_it_does_not_start_jax():
    code = """
import sys
from hybrid_dit import environment
before = environment.describe(), "jax" in sys.modules
import jax
imported = environment.describe(), jax._src.xla_bridge.backends_are_initialized()
jax.devices()
print("devices" in before[0], before[1], "devices" in imported[0], imported[1], "devices" in environment.describe())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False", "False", "False", "True"]
