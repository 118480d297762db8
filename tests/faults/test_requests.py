"""Any value of any field of any command: taken, with numbers that are finite, or refused in a sentence naming it."""

import dataclasses
import importlib
import json
import math
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from tests.conftest import call
from training import command, compare, embed, finetune, predict
from training.evaluate import __main__ as evaluate
from training.explore import __main__ as explore
from training.proxies import PROXIES
from training.proxies import __main__ as proxies

# A command's module, its command line, its options, and what it calls with what it did not refuse.
MODEL = ["model", "--data.path", "digits"]
COMMANDS = {
    **{
        task: ("training.__main__", ["--data.path", "digits", "--proxy.name", task], command.parser, "training.run.run")
        for task in PROXIES
    },
    "compare": (compare.__name__, ["--data.path", "digits"], compare.command, "training.compare.compare"),
    "proxies": (
        proxies.__name__, ["--data.path", "digits", "--tasks", '["moco"]'], proxies.command, "training.compare.compare",
    ),
    "finetune": (finetune.__name__, MODEL, lambda given: finetune.command(), "training.finetune.finetune"),
    **{
        module.__name__: (module.__name__, [*MODEL, "--out", out], lambda given, module=module: module.command(), work)
        for module, out in ((evaluate, "x.jsonl"), (embed, "x.parquet"), (predict, "x.csv"))
        for work in ["training.inputs.one_process"]
    },
    explore.__name__: (
        explore.__name__, [".", *MODEL[1:]], lambda given: explore.command(), "training.inputs.one_process",
    ),
}  # fmt: skip


def fields():
    """Every option once: those that commands share, of the first that has it."""
    seen = {"help", "config", "print_config"}
    for name, (_, start, parser, _) in COMMANDS.items():
        for option in parser(start)._option_string_actions:
            if option.startswith("--") and option[2:] not in seen:
                seen.add(option[2:])
                yield name, option[2:]


FIELDS = list(fields())
NUMBERS = st.integers(-(10**25), 10**25) | st.floats() | st.floats(-2, 2) | st.integers(-3, 20)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
PLAIN = NUMBERS | st.booleans() | st.none() | WORDS
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2))
ODD = [
    "inf",
    "-.inf",
    ".nan",
    "1e400",
    "1_0",
    "0x1F",
    "[1",
    "{a",
    "&a [*a]",
    "!!python/object:os.system",
    "@x",
    "~",
    "'",
]


def numbers(value):
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, float):
        yield value


def nested(field, value):
    """A recipe with one field."""
    for part in reversed(field.split(".")):
        value = {part: value}
    return value


def check(chosen, value, in_file):
    """Ask a command for one value of one field, on the command line or in a file."""
    name, field = chosen
    module, start, _, works = COMMANDS[name]
    taken = []

    def work(*args, **kwargs):
        taken.append([args, kwargs])
        raise command.Refused(f"{field}: taken")

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(works, work)
        given = [f"--{field}={value if isinstance(value, str) else json.dumps(value)}"]
        if in_file and start[0] == "--data.path":
            given = ["--config", f"{folder}/x.yaml"]
            Path(folder, "x.yaml").write_text(yaml.safe_dump(nested(field.rstrip("+"), value)), encoding="utf-8")
        done = call(importlib.import_module(module).main, *given, *start)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert field.split(".")[-1].rstrip("+") in done.stderr or "/x.yaml cannot be read as YAML" in done.stderr
    assert all(map(math.isfinite, numbers(taken)))


REQUESTS = st.sampled_from(FIELDS), VALUES | st.sampled_from(ODD), st.booleans()
ALWAYS = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
ALWAYS["phases"] = [Phase.explicit, Phase.generate]  # making a request that fails smaller takes minutes


@settings(max_examples=60, derandomize=True, **ALWAYS)
@example(("proxies", "tasks"), "[rotatoin]", False)
@example((evaluate.__name__, "residue"), "", False)
@example(("rotation", "relearn.views"), [{}], True)
@example(("jigsaw", "proxy.options"), {"": 1}, True)
@example(("jigsaw", "proxy.options"), {"; ": 1}, True)
@example(("jigsaw", "proxy.options"), {"; ": 1}, False)
@example((explore.__name__, "images"), -1, False)
@example((explore.__name__, "batch_size"), 0, False)
@example(("rotation", "run"), "a\0b", True)
@given(*REQUESTS)
def test_any_value_is_taken_or_refused_naming_its_field(chosen, value, in_file):
    check(chosen, value, in_file)
