"""Text in, checkpoints out (under construction)."""

import argparse
import dataclasses
import sys

from model import InputError


# ---- settings and flags -------------------------------------------------------------------------

def setting(default, help, choices=None):
    """One field of a settings dataclass: its default, its line of documentation, its choices."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def add_flags(parser, Settings):
    """Give parser one flag per field of the dataclass: `batch_size: int` becomes `--batch-size`.

    A bool field becomes a pair of switches, --name and --no-name; the help is the field's own line.
    """
    for field in dataclasses.fields(Settings):
        name = "--" + field.name.replace("_", "-")
        help = field.metadata["help"].replace("%", "%%")
        if field.default is not None:
            help += f" (default: {field.default})"
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": str if field.default is None else type(field.default),
                    "choices": field.metadata["choices"]}
        parser.add_argument(name, default=field.default, help=help, **kind)


def parse_settings(Settings, argv=None):
    """Read the command line into the dataclass `Settings`; its docstring is the help's text."""
    parser = _OneLineParser(description=Settings.__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, Settings)
    return Settings(**vars(parser.parse_args(argv)))


def run_script(main):
    """Call main(); on bad input print one line and exit with status 2, on Ctrl-C with 130."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
