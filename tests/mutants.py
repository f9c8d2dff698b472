"""Does some test fail when the code is wrong? Each entry of mutants.json is one mistake that a
person could make: a flipped sign, a dropped detach, a mask off by one. This script makes it in a
copy of the repository and runs the one test that has to fail.

    python tests/mutants.py                all of them, some minutes
    python tests/mutants.py reward.py kl   only those whose entry holds one of these words

An entry has a file, the old text, which stands there exactly once, the new text and the test. The
exit status is 1 if a mutant survived or could not be made, or if a test fails without any mistake.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "out", "*.png")


def load_mutants():
    return json.loads((ROOT / "tests" / "mutants.json").read_text(encoding="utf-8"))


def mutated(mutant):
    """The file's text with the mistake in it. Raises ValueError where the old text does not stand
    there exactly once, or where the new one is the same."""
    text = (ROOT / mutant["file"]).read_text(encoding="utf-8")
    count = text.count(mutant["old"])
    if count != 1 or mutant["old"] == mutant["new"]:
        raise ValueError(f"{mutant['file']} holds {mutant['old']!r} {count} times, or it stays")
    return text.replace(mutant["old"], mutant["new"])


def run_tests(tests, file=None, text=None):
    """pytest's exit status in a copy of the repository where `file` holds `text`: 0 if all tests
    passed, 1 if some failed, more if they could not be run."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "copy"
        shutil.copytree(ROOT, root, ignore=NOT_COPIED)
        if file:
            (root / file).write_text(text, encoding="utf-8")
        return subprocess.run(command, cwd=root, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


def verdict(mutant):
    """"killed", "survived", or what went wrong."""
    try:
        text = mutated(mutant)
    except ValueError as error:
        return f"not made: {error}"
    status = run_tests([mutant["test"]], mutant["file"], text)
    return {0: "survived", 1: "killed"}.get(status, f"not run: pytest ended with {status}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    args = parser.parse_args()
    mutants = load_mutants()
    if args.words:
        mutants = [m for m in mutants if any(word in json.dumps(m) for word in args.words)]
    tests = sorted({mutant["test"] for mutant in mutants})
    if run_tests(tests) != 0:
        sys.exit("the tests do not pass on the code as it is: " + " ".join(tests))
    others = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, outcome in zip(mutants, pool.map(verdict, mutants)):
            if outcome != "killed":
                others += 1
                print(f"{outcome}\n  {mutant['file']}: {mutant['old']}\n  -> {mutant['new']}\n"
                      f"  {mutant['test']}", flush=True)
    print(f"{len(mutants) - others} of {len(mutants)} mutants killed")
    sys.exit(1 if others else 0)


if __name__ == "__main__":
    main()
