"""The command line: a dataclass of settings becomes flags, and bad input becomes one line.

`python afd.py --nope` prints one line and exits with status 2. So does everything that a user can
put right; only a mistake of ours shows a traceback.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch


class InputError(ValueError):
    """The user's input is at fault: scripts print it as one line and exit with status 2."""


def require(condition, message):
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


# ---- settings and flags -------------------------------------------------------------------------

def setting(default, help, least=None, most=math.inf, choices=None):
    """One field of a settings dataclass: its default, its line of documentation, and the values
    that it may have, from `least` to `most` or one of `choices`."""
    return dataclasses.field(default=default, metadata={
        "help": help, "choices": choices, "least": least, "most": most})


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def parse_settings(Settings, argv=None):
    """Read the command line into the dataclass: its docstring is the help's text, each field a
    flag (`n_demos: int` becomes `--n-demos`), a bool a switch. Raises InputError."""
    parser = _OneLineParser(description=Settings.__doc__, usage=argparse.SUPPRESS,
                            allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Settings):
        name = "--" + field.name.replace("_", "-")
        help = field.metadata["help"].replace("%", "%%")
        if isinstance(field.default, bool):
            parser.add_argument(name, action="store_true", help=help)
            continue
        if field.default not in (None, ""):
            help += f" (default: {field.default})"
        kind = str if field.default is None else type(field.default)
        parser.add_argument(name, default=field.default, help=help, type=kind,
                            choices=field.metadata["choices"])
    settings = Settings(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(Settings):
        value, least = getattr(settings, field.name), field.metadata["least"]
        # Python has half a character for each byte of a file name that is not UTF-8.
        if isinstance(value, str):
            require(value.encode(errors="replace").decode() == value,
                    f"--{field.name.replace('_', '-')} {value!r}: not UTF-8; rename the file")
        if least is not None:
            most = field.metadata["most"]
            # Written so that nan, which compares with nothing, is refused too.
            require(least <= value <= most, f"--{field.name.replace('_', '-')} must lie in "
                    f"[{least:g}, {most:g}], not {value}")
    return settings


def plural(n, things):
    """"1 text", "2,000 texts": n of the things, whose name is given in the plural."""
    return f"{n:,} {things.removesuffix('s') if n == 1 else things}"


def printable(text):
    """The text with its control characters escaped: printed, they could clear the screen."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run_script(main):
    """Call main(). Bad input, a training that diverged and a file that cannot be written are one
    line and exit status 2. Ctrl-C is 130. A reader of the output that leaves, as `| head -1` does,
    is 141 without a word, as in a shell."""
    for stream in (sys.stdout, sys.stderr):
        # A console may lack a character: that must not end a run after its training.
        if hasattr(stream, "reconfigure"):      # a notebook's has none
            stream.reconfigure(errors="replace")
    try:
        main()
        print(end="", flush=True)
    except (InputError, FloatingPointError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # Python flushes on its way out: what is left of the output must go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


# ---- the machine --------------------------------------------------------------------------------

def choose_device(name):
    """torch.device of a --device flag; "auto" takes CUDA, then MPS, then the CPU.

    On CUDA float32 matrix products are TF32 from now on. Raises InputError for a device that is not
    there.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [*(kind for kind, there in found.items() if there), "cpu"]
    if name == "auto":
        name = available[0]
    require(name.split(":")[0] in available,
            f"no device {name!r} here; available: {', '.join(available)}")
    try:
        device = torch.zeros(1, device=name).device
    except RuntimeError as error:
        raise InputError(f"no device {name!r} here") from error
    if device.type == "cuda":       # Their factors are rounded to ten bits of fraction.
        torch.set_float32_matmul_precision("high")
    return device


def in_threads(function, jobs, device):
    """[function(job) for job in jobs]; on a CPU as many at a time as there are cores, one core
    each, because a step of a small model is too short to share out among cores."""
    cores = torch.get_num_threads()
    if device.type != "cpu" or cores == 1:
        return [function(job) for job in jobs]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores) as pool:
            return list(pool.map(function, jobs))
    finally:
        torch.set_num_threads(cores)


# ---- files --------------------------------------------------------------------------------------

def make_folder(out):
    """The folder `out` as a Path, made if need be. Raises InputError where it can't be written."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    return out


def write_aside(path, write):
    """write(part) fills a file beside path, which is then renamed: path is whole or not there.

    Raises InputError where it cannot be written: what was there before is then still there.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        part.replace(path)
    except Exception as error:      # a full disk is another kind of error in each library
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.splitlines()[0]
        raise InputError(f"{path}: cannot be written; is the disk full? ({reason})") from error
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value, indent=1):
    """Write value as JSON, aside first. A number that does not exist (nan) is written as null."""
    # Python writes nan as NaN, which is no JSON: reading it back turns it into None.
    known = json.loads(json.dumps(value),
                       parse_constant=lambda name: None if name == "NaN" else float(name))
    text = json.dumps(known, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    write_aside(path, lambda part: part.write_text(text, encoding="utf-8"))


def load_json(path):
    """The value of a JSON file; None if there is no such file."""
    if not path.is_file():
        return None
    refuse_pointer(path)
    return json.loads(path.read_text(encoding="utf-8"))


def refuse_pointer(path):
    """Raise InputError for a git-lfs pointer: the few lines that stand for a file not fetched."""
    try:
        with open(path, "rb") as file:
            start = file.read(24)
    except (OSError, ValueError):       # Whoever reads the file says what is the matter.
        return
    require(start != b"version https://git-lfs.",
            f"{path}: a git-lfs pointer, not the file itself; fetch it with `git lfs pull`")
