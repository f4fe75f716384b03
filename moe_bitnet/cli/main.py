"""The entry point ``moe-bitnet``: parse, run one subcommand, turn errors into one sentence.

Exit codes: 0 done, 2 an error the user can mend, 130 interrupted.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from rich.logging import RichHandler

from moe_bitnet.cli import (
    context,
    data,
    demo,
    export,
    generate,
    inspect,
    kv_eval,
    pack,
    place,
    report,
    sweep,
    train,
    upcycle,
)
from moe_bitnet.cli.console import console, print_json, say
from moe_bitnet.cli.run_folder import DEFAULT_RUN
from moe_bitnet.errors import MoEBitNetError

COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "data": data,
    "train": train,
    "sweep": sweep,
    "export": export,
    "pack": pack,
    "place": place,
    "generate": generate,
    "context": context,
    "report": report,
    "inspect": inspect,
    "kv-eval": kv_eval,
    "upcycle": upcycle,
}
# these print for a person by themselves
_HAS_OWN_OUTPUT = ("context", "demo", "kv-eval", "place", "report", "sweep")
# these are told of a model, not of an experiment
_WITHOUT_RUN_FOLDER = ("export", "inspect", "kv-eval", "upcycle")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False, show_time=False)],
    )
    # a polite kill ends like Ctrl-C: files are whole, processes are stopped
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = COMMANDS[args.command].run(args)
    except MoEBitNetError as error:
        say(f"error: {error}")
        return 2
    except OSError as error:
        if error.errno is None:
            raise
        say(f"error: {error}. What was complete stays as it was; check disk space, rights and the names of files.")
        return 2
    except KeyboardInterrupt:
        say("interrupted. What was finished is kept; run the same command to go on.")
        return 130
    if args.json:
        print_json(result)
    elif args.command not in _HAS_OWN_OUTPUT:
        _print_summary(result)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="moe-bitnet",
        description="Ternary (1.58-bit) Mixture-of-Experts language models with long context, on Ray.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=module.HELP, description=f"{module.__doc__}".replace("``", ""))
        subparser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
        if name not in _WITHOUT_RUN_FOLDER:
            subparser.add_argument(
                "--run",
                type=Path,
                default=DEFAULT_RUN,
                metavar="FOLDER",
                help=f"folder of the experiment (default: {DEFAULT_RUN})",
            )
        module.add_arguments(subparser)
    return parser


def _print_summary(result: dict[str, object]) -> None:
    """Write a result as ``name: value`` lines; nested values stay in the JSON form."""
    for name, value in result.items():
        if isinstance(value, (str, int, float)) or value is None:
            sys.stdout.write(f"{name}: {value}\n")


if __name__ == "__main__":
    sys.exit(main())
