"""Do the tests notice when the code changes? ``pip install coverage mutmut``, then ``python tests/mutants.py FOLDER``.

Of all places of both packages that mutmut knows a change for, type hints aside, a seeded sample, each equally likely.
One change at a time is made in a clone of the last commit; the tests that run the changed line run on it, those of the
module's own file first, then the quickest, until one fails. ``--again`` runs more of them, and others of their files,
where none did. FOLDER keeps which test runs which line, and what came of each change (results.jsonl, where "survived"
becomes "equivalent" by hand); the same command goes on.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="agg", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")

import argparse
import contextlib
import difflib
import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

# What tests import is loaded once; each run of them is a fork.
import accelerate  # noqa: F401
import coverage
import datasets  # noqa: F401
import jsonargparse  # noqa: F401
import libcst
import matplotlib.pyplot  # noqa: F401
import pytest
import scipy.optimize  # noqa: F401
import sklearn.linear_model  # noqa: F401
import timm  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).parent.parent
PACKAGES = ("training", "sslpp_models")
# They need a GPU or other packages, or are about kills and full disks at any moment.
LEFT_OUT = ("test_cuda.py", "test_downstream.py", "test_disks.py", "test_kills.py", "test_processes.py")
FIRST, MORE = 6, 160  # seconds of a core that tests take
PATIENCE = 600  # seconds, of those that wait for each other


def places(path, seed):
    """Each place of a file that can change: its rank in the sample, its lines, and one change of it, drawn."""
    tree = MetadataWrapper(libcst.parse_module(path.read_text()), unsafe_skip_copy=True)
    where, waiting, seen = tree.resolve(PositionProvider), [tree.module], Counter()
    while waiting:
        node = waiting.pop()
        waiting += [child for child in node.children if not isinstance(child, libcst.Annotation)]
        found = [new for kind, operator in mutation_operators if isinstance(node, kind) for new in operator(node)]
        if found and node in where:
            start, end = where[node].start, where[node].end
            # By the text and not by the line's number: most of the sample stays what it is where code changes.
            text = f"{path} {tree.module.code_for_node(node)}"
            draw = random.Random(f"{seed} {text} {seen[text]}")
            seen[text] += 1
            yield draw.random(), path, (start.line, end.line), (tree.module, node, draw.choice(found))


def forked(work, limit, log):
    """The exit status of ``work()`` in a group of its own, none of whose processes takes over `limit` seconds."""
    if not (child := os.fork()):
        status = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                status = work()
                sys.stdout.flush()
        finally:
            os._exit(int(status))
    ends, ended = time.monotonic() + PATIENCE, 0
    while not ended and time.monotonic() < ends:
        time.sleep(0.05)
        ended, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status if ended else os.waitpid(child, 0)[1])


def run_tests(names, folder, plugins=()):
    options = ["-o", "addopts=", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp", "-k", "not killed_twice"]
    return pytest.main([*options, *names], plugins=plugins)


class Recorder:
    """Which lines each test runs, in processes of its own too, how long it takes, and whether it passes."""

    def __init__(self, file):
        self.cover = coverage.Coverage(data_file=file, source=PACKAGES, data_suffix=True)
        self.seconds, self.failed = {}, set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.cover.switch_context(item.nodeid)
        start = sum(os.times()[:4])
        result = yield
        self.seconds[item.nodeid] = sum(os.times()[:4]) - start
        return result

    def pytest_runtest_logreport(self, report):
        if not report.passed:
            self.failed.add(report.nodeid)


def record(test, file, folder):
    """Run a file of tests, and write ``file``: {"seconds": {test: seconds}, "lines": {source: {line: [tests]}}}."""
    data = folder / "map" / f"{file.stem}.data"
    settings = folder / "map" / f"{file.stem}.ini"
    context = "${PYTEST_CURRENT_TEST-}"
    settings.write_text(
        f"[run]\nparallel = true\ndata_file = {data}\nsource = {','.join(PACKAGES)}\ncontext = {context}\n"
    )
    os.environ["COVERAGE_PROCESS_START"] = str(settings)
    recorder = Recorder(data)
    recorder.cover.start()
    run_tests([test], folder, [recorder])
    recorder.cover.stop()
    recorder.cover.save()
    cover = coverage.Coverage(data_file=data)
    cover.combine([str(path) for path in data.parent.glob(f"{data.name}.*")])
    lines, copy = {}, f"{Path.cwd()}/"
    for source in cover.get_data().measured_files():
        if not source.startswith(copy):  # a test's own copy of the package
            continue
        found = lines[source.removeprefix(copy)] = {}
        for line, contexts in cover.get_data().contexts_by_lineno(source).items():
            names = {re.sub(r" \((setup|call|teardown)\)$", "", name) for name in contexts}
            found[line] = sorted(names & (recorder.seconds.keys() - recorder.failed))
    seconds = {name: value for name, value in recorder.seconds.items() if name not in recorder.failed}
    file.write_text(json.dumps({"seconds": seconds, "failed": sorted(recorder.failed), "lines": lines}))
    return 0


def choose(path, lines, seconds, runs):
    """Two lists of tests for a changed place: those that run its lines, and the others of their files."""
    found = set().union(*(runs[path].get(line, ()) for line in range(lines[0], lines[1] + 1)))
    above = lines[0]
    while not found and (above := above - 1) > 0 and above > lines[0] - 10:
        found = set(runs[path].get(above, ()))
    found = found or set().union(*runs[path].values())  # what runs at import is everybody's
    own = f"test_{Path(path).stem}.py"
    ordered = sorted(found, key=lambda test: (own not in test, seconds[test]))
    files = Counter(test.split("::")[0] for test in ordered)
    others = [test for test in seconds if test.split("::")[0] in files and test not in found]
    others.sort(key=lambda test: (own not in test, -files[test.split("::")[0]], seconds[test]))
    first, rest, total = [], [], 0.0
    for test in ordered:
        total += seconds[test]
        (first if total < FIRST or not first else rest).append(test)
    rest, total, more = rest + others, 0.0, []
    for test in rest:
        if total + seconds[test] < MORE:
            total += seconds[test]
            more.append(test)
    return first, more


def recorded(folder):
    """How long each test takes, and which tests run each line of each source; recorded where it is not yet."""
    seconds, runs = {}, defaultdict(lambda: defaultdict(set))
    for test in sorted(Path("tests").rglob("test_*.py"), key=lambda path: (len(path.parts), path)):
        file = folder / "map" / f"{test.stem}.json"
        if test.name in LEFT_OUT:
            continue
        if not file.exists():
            print("recording", test, flush=True)
            forked(partial(record, str(test), file, folder), 600, file.with_suffix(".log"))
        found = json.loads(file.read_text())
        seconds |= found["seconds"]
        for source, lines in found["lines"].items():
            for line, tests in lines.items():
                runs[source][int(line)] |= set(tests)
    return seconds, runs


def judge(groups, seconds, folder):
    """What the tests say of the code as it is now, and which of them: each group of tests, until one fails."""
    for tests in filter(None, groups):
        limit = 20 + round(4 * sum(seconds[test] for test in tests))
        status = forked(partial(run_tests, ["-x", *tests], folder), limit, folder / "log")
        if status:
            failed = re.findall(r"^(?:FAILED|ERROR) .*", (folder / "log").read_text(), re.M)
            return "noticed", failed[0][:300] if failed else f"exit status {status}"
    return "survived", ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="More tests on what was not noticed.")
    options = parser.parse_args()
    folder = options.folder.absolute()
    (folder / "map").mkdir(parents=True, exist_ok=True)
    copy = folder / "code"  # a clone, in which only what a commit changes is written anew, and compiled anew
    if not copy.exists():
        subprocess.run(["git", "clone", "--quiet", ROOT, copy], check=True)
    subprocess.run(["git", "-C", copy, "fetch", "--quiet", ROOT, "HEAD"], check=True)
    subprocess.run(["git", "-C", copy, "reset", "--quiet", "--hard", "FETCH_HEAD"], check=True)
    os.chdir(copy)
    sys.path[0] = os.environ["PYTHONPATH"] = str(copy)
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds, runs = recorded(folder)
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sources = [path for package in PACKAGES for path in sorted(Path(package).rglob("*.py"))]
    sample = sorted((place for path in sources for place in places(path, options.seed)), key=lambda place: place[0])
    results, done = folder / "results.jsonl", {}
    for line in results.read_text().splitlines() if results.exists() else ():
        done[json.loads(line)["change"]] = json.loads(line)
    for rank, (_, path, lines, (module, node, new)) in enumerate(sample[: options.count]):
        old, stamp = path.read_text(), path.stat()
        code = module.deep_replace(node, new).code
        change = "\n".join(difflib.unified_diff(old.splitlines(), code.splitlines(), str(path), lineterm="", n=0))
        if change not in done or (options.again and done[change]["outcome"] == "survived"):
            groups, start = choose(str(path), lines, seconds, runs), time.monotonic()
            path.write_text(code)
            try:
                outcome, by = judge(groups if options.again else groups[:1], seconds, folder)
            finally:
                path.write_text(old)
                os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
            took = round(time.monotonic() - start, 1)
            done[change] = {"rank": rank, "change": change, "outcome": outcome, "by": by, "seconds": took}
            with results.open("a") as out:
                out.write(json.dumps(done[change]) + "\n")
            print(rank, outcome, took, path, lines[0], by[:100], flush=True)
    counts = Counter((result["change"].split()[1], result["outcome"]) for result in done.values())
    for name in [*sorted({name for name, _ in counts}), ""]:
        told = Counter()
        for (of, outcome), number in counts.items():
            told[outcome] += number * (not name or of == name)
        print(f"{name or 'all':40}", *(f"{outcome} {n}" for outcome, n in sorted(told.items()) if n))


if __name__ == "__main__":
    main()
