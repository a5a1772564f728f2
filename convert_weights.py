"""Converts weights of a Wan2.1 DiT between PyTorch's safetensors and an Orbax checkpoint of the Flax model.

    python convert_weights.py import SRC DST [--dtype=bfloat16]
    python convert_weights.py export SRC DST --format=wan|diffusers
    python convert_weights.py inspect SRC

SRC: safetensors in the original layout (a file or a folder of shards), a ComfyUI single file, a diffusers transformer
or pipeline folder, the workdir of a surgery, or an Orbax folder written by `import`. DST: a folder that doesn't exist.
"""

import argparse
import signal
import sys
from collections.abc import Sequence

from hybrid_dit.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("import", "export", "inspect"):
        command = commands.add_parser(name)
        command.add_argument("source", metavar="SRC")
        if name != "inspect":
            command.add_argument("target", metavar="DST")
        if name == "import":
            command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as in SRC")
        if name == "export":
            command.add_argument("--format", choices=("wan", "diffusers"), required=True)
    args = parser.parse_args(argv)
    from hybrid_dit.convert import commands  # imports JAX: not needed to tell a wrong option

    try:
        if args.command == "import":
            print(commands.import_weights(args.source, args.target, args.dtype))
        elif args.command == "export":
            print(commands.export_weights(args.source, args.target, args.format))
        else:
            print(commands.inspect_weights(args.source))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `inspect SRC | head` ends quietly
    sys.exit(main(sys.argv[1:]))
