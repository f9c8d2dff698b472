"""A run's bookkeeping: its flags, its folder, what it remembers of finished stages.

A run may be killed at any moment: whatever it keeps is written aside and renamed, and it draws its
randomness by stage, so that --resume goes on to the results of an uninterrupted run: bit for bit
on a CPU, where a sum is always taken in the same order, which not all of a GPU's kernels promise.
"""

import argparse
import copy
import dataclasses
import json
import os
import platform
import random
import re
import shutil
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import tokenizers
import torch

from model import InputError, write_aside, write_json
from utils.batches import from_first, rank_and_count
from utils.checkpoints import checksum

try:
    import fcntl
except ImportError:     # not on Windows: there two runs on one folder are not noticed
    fcntl = None


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
        if field.default not in (None, ""):
            help += f" (default: {field.default})"
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": str if field.default is None else type(field.default),
                    "choices": field.metadata["choices"]}
        parser.add_argument(name, default=field.default, help=help, **kind)


def parse_settings(Settings, argv=None):
    """Read the command line into the dataclass `Settings`; its docstring is the help's text and
    says the usage."""
    parser = _OneLineParser(description=Settings.__doc__, usage=argparse.SUPPRESS,
                            allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, Settings)
    return Settings(**vars(parser.parse_args(argv)))


def counted(n, things):
    """"1 text", "2,000 texts": n of the things, whose name is given in the plural."""
    return f"{n:,} {things.removesuffix('s') if n == 1 else things}"


def run_script(main):
    """Call main(). Bad input and what cannot be written are one line and exit status 2; Ctrl-C is
    130; a reader of the output that leaves, as `| head -1` does, is no word and 141, as in a shell.
    """
    try:
        main()
        print(end="", flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes on its way
        sys.exit(141)
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


# ---- the machine --------------------------------------------------------------------------------

def choose_device(name, bf16=False, compile=False):
    """torch.device of a --device flag; "auto" takes CUDA, then MPS, then the CPU.

    Raises InputError for what is not there, and for flags that need CUDA elsewhere.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name.split(":")[0], False):
        raise InputError(f"no device {name!r} here; available: "
                         + ", ".join(kind for kind, there in available.items() if there))
    for flag, wanted in (("bf16", bf16), ("compile", compile)):
        if wanted and not name.startswith("cuda"):
            raise InputError(f"--{flag} needs CUDA; the device is {name}")
    if name == "cuda" and "LOCAL_RANK" in os.environ:       # torchrun: one GPU each
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
    except RuntimeError as error:
        raise InputError(f"no device {name!r} here") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def side_by_side(function, jobs, device):
    """[function(job) for job in jobs]; on a CPU as many at a time as there are cores, each on one:
    a step of a small model is too short to share out.
    """
    cores = torch.get_num_threads()
    if device.type != "cpu" or cores == 1:
        return [function(job) for job in jobs]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores) as pool:
            return list(pool.map(function, jobs))
    finally:
        torch.set_num_threads(cores)


# ---- the folder ---------------------------------------------------------------------------------

def provenance(command, s, device, data):
    """What defines a run, as its folder records it: settings, versions, device, and checksums of
    the data and of what the files that --init and --gold name hold. Raises InputError.
    """
    contents, gold = {"data": zlib.crc32(repr(data).encode())}, getattr(s, "gold", None)
    if s.init:
        contents["content of --init"] = checksum(s.init)
    if gold not in (None, "pairs"):     # FILE.py:FUNCTION
        contents["content of --gold"] = zlib.crc32(Path(gold.rpartition(":")[0]).read_bytes())
    return {"command": command, "config": dataclasses.asdict(s),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__, "tokenizers": tokenizers.__version__},
            "device": str(device), "processes": rank_and_count()[1],
            "contents": contents}


def make_folder(out):
    """The folder `out` as a Path, made if need be. Raises InputError where it can't be written."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    return out


@contextmanager
def claimed(out, name, head, overwrite=False, resume=False):
    """The folder `out`, this run's alone while the block lasts; yields what its file `name` says.

    That is head, from provenance(). resume: go on with the run whose file is there, if any, which
    must have had the same settings. overwrite: forget what another run remembered, and its seeds.
    Raises InputError where the folder cannot be written, is in use, or holds another run.
    """
    if rank_and_count()[0]:     # of several processes the first one sees to it
        head = from_first(None)
        if head is None:
            sys.exit(2)         # and has said why
        yield head
        return
    with ExitStack() as held:
        try:
            head = claim(Path(out), name, head, overwrite, resume, held)
        except (InputError, OSError):
            from_first(None)
            raise
        yield from_first(head)


def claim(out, name, head, overwrite, resume, held):
    """What claimed() yields; the folder's lock is let go of with `held`, an ExitStack."""
    file, lock = out / name, held.enter_context(open(make_folder(out) / ".lock", "a"))
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out}: another run is writing to it now") from None
    if resume and file.exists():
        return same_run(file, head)
    if resume:
        print(f"nothing to resume in {out}: a new run")
    if not overwrite and (file.exists() or (out / "config.json").exists()):
        raise InputError(f"{out} holds another run: choose another --out, --resume it or "
                         "--overwrite it")
    stale = [*out.glob("stages"), *out.glob("seed*/stages")]
    if overwrite:       # its seeds too, with their checkpoints
        stale += [path.parent for path in stale if re.fullmatch(r"seed\d+", path.parent.name)
                  and path.parent != out]
    init = head["config"]["init"]
    if init and any(Path(init).resolve().is_relative_to(path.resolve()) for path in stale):
        raise InputError(f"--overwrite would delete --init {init}: choose another --out")
    for path in stale:
        shutil.rmtree(path)
    write_json(file, head)
    return head


def same_run(file, head):
    """The head that `file` holds. Raises InputError naming the first setting that differs."""
    head = json.loads(json.dumps(head))
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        now, then = ({**h["versions"], **h["config"], "device": h["device"],
                      "processes": h["processes"], **h["contents"]} for h in (head, before))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not a run's settings, cannot be resumed") from error
    for name, value in now.items():
        if name not in ("out", "overwrite", "resume") and then.get(name) != value:
            raise InputError(f"{file.parent}: cannot be resumed with another {name}: it was "
                             f"{then.get(name)}, now {value}")
    return before


# ---- what is remembered -------------------------------------------------------------------------

SNAPSHOT_SECONDS = 20.0     # how much of a training loop's work a kill may cost


def previous(path):
    return path.with_name(path.name + ".prev")


def keep(path, value, of):
    """Write value, made of tensors, lists, dicts, numbers and text, for kept(path, of) to read.

    It is written aside and renamed; the file that was there before stays as path.prev.
    """
    def write(part):
        torch.save({"of": of, "value": value}, part)
        if path.exists():
            path.replace(previous(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, write)


def kept(path, of, device="cpu"):
    """The value that keep(path, value, of) wrote, or None. A file that is torn or of something else
    is named, and the one before it used. Only data is read, never code.
    """
    for file in (path, previous(path)):
        if not file.exists():
            continue
        try:
            with zipfile.ZipFile(file) as archive:      # torch itself does not look at checksums
                torn = archive.testzip()
            found = torch.load(file, map_location=device, weights_only=True)
            if torn is None and found["of"] == of:
                return found["value"]
        except Exception:       # a torn file fails in many ways, each with its own kind of error
            pass
        print(f"{file}: torn or of another run, not used", file=sys.stderr)
    return None


class Snapshot:
    """Where a training loop keeps its state now and then, so that it can go on bit for bit.

    path: the file; None: nothing is kept. of: what the loop was called with, to know its file by.
    parts: models, optimizers, random.Random, torch.Generator or whatever else has a state_dict.
    """

    def __init__(self, path, of, **parts):
        self.path, self.parts, self.saved = path, parts, time.monotonic()
        self.of = path and str(zlib.crc32(repr(of).encode()))

    def restore(self, device):
        """The data that was kept, each part being set to what it was then; {} if there is none."""
        state = self.path and kept(self.path, self.of, device) or {}
        for name, part in self.parts.items() if state else ():
            was = state.pop(name)
            if isinstance(part, random.Random):
                part.setstate(was)
            elif isinstance(part, torch.Generator):
                part.set_state(was.cpu())       # it is not kept where it generates
            else:
                part.load_state_dict(was)
        return state

    def keep(self, **data):
        """Keep data and the parts' states, if the last time is SNAPSHOT_SECONDS ago."""
        if not self.path or time.monotonic() - self.saved <= SNAPSHOT_SECONDS:
            return
        for name, part in self.parts.items():
            get = (getattr(part, "getstate", None) or getattr(part, "get_state", None)
                   or part.state_dict)
            data[name] = get()
        keep(self.path, data, self.of)
        self.saved = time.monotonic()


class Run:
    """One seed's bookkeeping: its stages and their seconds, losses to metrics.jsonl, randomness."""

    def __init__(self, out, seed, device):
        self.out, self.seed, self.device = out, seed, device
        self.folder = out / f"seed{seed}" / "stages"
        self.seconds, self.curves, self.watching = {}, {}, 0.0

    def whole(self, make):
        """What make() returns for this seed, as one stage; those inside it are then forgotten."""
        metrics, result = self.out / "metrics.jsonl", kept(self.folder / "seed.pt", "seed")
        if result is None:
            if metrics.exists():        # what an interrupted run wrote is written again
                lines = metrics.read_text().splitlines(keepends=True)
                lines = [line for line in lines
                         if line.endswith("\n") and json.loads(line)["seed"] != self.seed]
                write_aside(metrics, lambda part: part.write_text("".join(lines)))
            result = make()
            keep(self.folder / "seed.pt", result, "seed")
        for old in self.folder.glob("*"):
            if old.is_dir():
                shutil.rmtree(old)
            elif old.name != "seed.pt":
                old.unlink()
        return result

    def stage(self, name, says, make):
        """What make() returns; a resumed run reads what the finished stage had returned instead.

        A stage that says something is printed and timed, without the seconds that self.watching
        grew by. What it returns has to be data, as for keep().
        """
        if says:
            print(f"  {says}", flush=True)
        path = self.folder / f"{name}.pt"
        found = kept(path, name, self.device)
        if found is None:
            start = time.perf_counter() - self.watching
            value = make()
            found = {"value": value,
                     "seconds": round(time.perf_counter() - self.watching - start, 2)}
            keep(path, found, name)
            shutil.rmtree(self.snapshot(name).parent, ignore_errors=True)
        if says:
            self.seconds[name] = found["seconds"]
        return found["value"]

    def trained(self, name, says, like, learn, judge=None):
        """(model, history) of a stage in which learn() gives both and trains a judge along, if that
        is a module; a resumed run fills a copy of `like`, and the judge, with what they had become.
        """
        judge = judge if isinstance(judge, torch.nn.Module) else None

        def make():
            model, history = learn()
            return {"model": model.state_dict(), "history": history,
                    "judge": judge and judge.state_dict()}
        found, model = self.stage(name, says, make), copy.deepcopy(like)
        model.load_state_dict(found["model"])
        if judge:
            judge.load_state_dict(found["judge"])
        return model, found["history"]

    def snapshot(self, stage, part="fit"):
        """Where a training loop of a stage keeps its state until the stage is finished."""
        return self.folder / stage / part

    def rng(self, stage):
        """This seed's random.Random of a stage: the same whatever other stages draw."""
        return random.Random(f"{self.seed} {stage}")

    def generator(self, stage):
        return torch.Generator(self.device).manual_seed(self.rng(stage).getrandbits(62))

    def log(self, stage, history):
        with open(self.out / "metrics.jsonl", "a") as file:
            for record in history:
                file.write(json.dumps({"seed": self.seed, "stage": stage, **record}) + "\n")
