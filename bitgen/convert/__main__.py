"""The command `python -m bitgen.convert INPUT OUTPUT_DIR`, with `--to-torch` and `--list`."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence

from bitgen.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see python -m bitgen.convert --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Converts; returns the exit status: 0, or 2 after one message about bad input."""
    try:
        _run(_parse(argv))
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        "python -m bitgen.convert",
        usage="""%(prog)s INPUT OUTPUT_DIR [--model=NAME] [--weights=ema|model] [--dtype=...]
       %(prog)s --to-torch MODEL_DIR OUT.pt [--tokenizer=MODEL_DIR]
       %(prog)s --list [--parameters]""",
        description="Checkpoint files to model directories and back.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "input",
        nargs="?",
        help="checkpoint file, index of shards, folder of one, or model directory",
    )
    add("output", nargs="?", help="model directory, or the file that --to-torch writes")
    add("--model", metavar="NAME", help="name in the zoo, to override what the file tells")
    add("--weights", choices=["ema", "model"], help="of a file with both; ema by default")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the parameters")
    add("--to-torch", action="store_true", help="write the file that the PyTorch code loads")
    add("--tokenizer", metavar="DIR", help="to write into the file of a BitDance trained here")
    add("--list", action="store_true", help="list the released checkpoints that are known")
    add("--parameters", action="store_true", help="with --list: of each network, and as published")
    args = parser.parse_args(argv)
    if not args.list and (args.input is None or args.output is None):
        parser.error("INPUT and OUTPUT_DIR are needed")
    if args.parameters and not args.list:
        parser.error("--parameters goes with --list")
    return args


def _run(args: argparse.Namespace) -> None:
    # Before JAX is imported: this needs no accelerator, and must not take one from a run.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from absl import logging as absl_logging

    from bitgen.convert.directory import export_file, import_file
    from bitgen.hub import zoo
    from bitgen.runtime.logging import log_info, quiet

    quiet()
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs what we report
    if args.list:
        print(zoo.parameter_table() if args.parameters else zoo.table())
    elif args.to_torch:
        count = export_file(args.input, args.output, args.tokenizer)
        log_info(f"wrote {args.output}: {count} tensors")
    else:
        info, parameters, plan, others = import_file(
            args.input, args.output, args.model, args.weights, args.dtype
        )
        sizes = zoo.describe(info["family"], info["hparams"])
        notes = [f"{info['family']} {info['kind']}, {sizes}", f"{parameters / 1e6:.1f}M parameters"]
        if plan.carried:
            notes.append(f"{len(plan.carried)} tensors kept aside")
        ignored = Counter(plan.ignored.values())
        notes += [f"{count} ignored: {reason}" for reason, count in ignored.items()]
        if others:
            notes.append(f"not converted: {', '.join(others)}")
        log_info(f"wrote {args.output}: {'; '.join(notes)}")


if __name__ == "__main__":
    sys.exit(main())
