"""Converts Wan2.1 weights between PyTorch's files and Orbax checkpoints of the Flax models.

    python convert_weights.py import SRC DST [--dtype=bfloat16]
    python convert_weights.py export SRC DST --format=wan|diffusers
    python convert_weights.py inspect SRC

SRC: a DiT, text encoder (UMT5) or VAE in the original layout or that of diffusers and transformers (safetensors, one
file or shards with or without index; .pth), a ComfyUI single file, a whole pipeline (diffusers' folder or the original
release's), the workdir of a surgery, or what `import` wrote. DST: a folder that doesn't exist.
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
        if name != "inspect":
            command.add_argument("--allow-nonfinite", action="store_true", help="take NaN and Inf as they are")
        if name == "export":
            command.add_argument("--format", choices=("wan", "diffusers"), required=True)
    args = parser.parse_args(argv)
    from hybrid_dit.convert import commands  # imports JAX: not needed to tell a wrong option

    try:
        if args.command == "import":
            print(commands.import_weights(args.source, args.target, args.dtype, args.allow_nonfinite))
        elif args.command == "export":
            print(commands.export_weights(args.source, args.target, args.format, args.allow_nonfinite))
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
