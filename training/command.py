"""What commands share: parsers, recipes from a command line, one sentence and an exit status for what stops them."""

import dataclasses
import difflib
import io
import os
import re
import signal
import sys
from argparse import Action
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from . import usage
from .config import check_mappings, load
from .files import Failed, Refused, moved, read_text, reason
from .limits import PositiveInt
from .names import escape
from .recipe import Data, Evaluate, Proxy, Recipe, Running, Schedule

MISSING = "MODEL is missing: name a model's folder, such as runs/mine/hub, or any name that timm loads with weights"
NO_STATISTICS = "batch norms that begin at random have no stored statistics to normalise by"

# What people set of a recipe: what --help shows.
USUAL = (
    "config", "data.path", "run", "model.name", "model.pretrained", "data.size", "proxy.name", "proxy.epochs",
    "clusters.k", "relearn.epochs", "relearn.rounds", "precision",
)  # fmt: skip


class Parser(ArgumentParser):
    """A parser that says what is wrong in one sentence.

    Attributes:
        usual: options that --help shows, all others --help_all; without any it shows all.
    """

    usual: tuple[str, ...] = ()

    def format_help(self) -> str:
        return usage.short(self, self.usual) if self.usual else usage.whole(self)

    def show(self, *usual: str) -> "Parser":
        """Show these options by --help, and all by --help_all."""
        self.add_argument("--help_all", action=_HelpAll, nargs=0, help="Show every option and exit.")
        self.usual = usual
        return self

    def read(self, arguments: Sequence[str]) -> Namespace:
        """Parse a command line.

        Raises:
            Refused: it is wrong.
        """
        check_mappings(arguments)
        for argument in arguments:
            if any("\ud800" <= mark <= "\udfff" for mark in argument):
                raise Refused(f"{escape(argument)} has bytes that are no UTF-8, as records and recipes are; rename it.")
        try:
            return self.parse_args(list(arguments))
        except ArgumentError as error:
            raise Refused(str(error)) from error

    def error(self, message: str, ex: Exception | None = None) -> None:
        text = re.sub(r"\s+", " ", str(message)).strip()
        text = re.sub(r'^Parser key "([^"]+)": ?', r"\1: ", text)
        text = re.sub(r"^Group '(.+)' does not accept option '(.+)'$", r"there is no field \1.\2", text)
        mapping = r"\1: \2 is no mapping; YAML wants a space after each colon, as in {channels: [16, 32]}"
        text = re.sub(r"^(\S+): Expected a <class 'dict'>\. Got value: (.+)$", mapping, text)
        text = re.sub(r"^the following arguments are required: model$", MISSING, text)
        unknown = re.match(r"unrecognized arguments: --([^ =]+)|there is no field (.+)", text)
        hint = self.near(next(filter(None, unknown.groups()))) if unknown else ""
        raise Refused(f"{text}{hint} (see --help)") from ex

    def near(self, name: str) -> str:
        """What an option that does not exist may have meant, as the end of a sentence."""
        known = [option[2:] for option in self._option_string_actions if option[:2] == "--" and option[-1] != "+"]
        name = name.replace("-", "_")
        found = [option for option in known if option.split(".")[-1] == name]
        found = found or difflib.get_close_matches(name, known, 2, 0.8)
        return f"; did you mean {' or '.join(f'--{option}' for option in found)}?" if found else ""


class _HelpAll(Action):
    def __call__(self, parser: Parser, *_: Any) -> None:
        print(usage.whole(parser), end="")
        parser.exit()


def model_parser(
    name: str, description: str, options: str = "", unused: Collection[str] = (), sizes: bool = False
) -> Parser:
    """A parser of ``python -m training.NAME MODEL --data.path DATA``.

    Args:
        name: of the command.
        description: what it does.
        options: what else it takes, for the line of usage.
        unused: fields of the data that it has no use for.
        sizes: whether it takes a size other than the model's.
    """
    line = " ".join(filter(None, ("%(prog)s MODEL --data.path DATA", options, "[--FIELD VALUE ...]")))
    made = Parser(prog=f"python -m training.{name}", description=description, usage=line, allow_abbrev=False)
    made.add_argument("model", help="A model's folder, or any name that timm loads with weights.")
    made.add_class_arguments(Data, "data", skip={"size", *unused})
    if sizes:
        made.add_argument("--data.size", type=PositiveInt | None, help="Working size, px; without it the model's own.")
    return made


ABOUT = "A recipe in, a run folder out. Without any argument: the quickstart, on digits. Started again, it goes on."


def parser(
    arguments: Sequence[str],
    prog: str = "python -m training",
    description: str = ABOUT,
    skip: Collection[str] = (),
) -> Parser:
    """The command line of what takes a recipe: ``--config FILE`` and an option for each field that is not skipped.

    The proxy task that `arguments` name has its own options, and its own defaults of the fields that all tasks have.
    """
    from . import proxies

    line = "%(prog)s [--config RECIPE] [--FIELD VALUE ...]"
    result = Parser(prog=prog, description=description, usage=line, allow_abbrev=False)
    result.add_argument("--config", action="config", help="Recipe, a YAML file; later options override it.")
    result.add_class_arguments(Running, as_group=False, skip={"log", *skip})
    task = proxies.find(proxy_name(arguments))
    for field in dataclasses.fields(Recipe):
        if field.name == "proxy":
            result.add_class_arguments(Proxy, "proxy", skip={"options"})
            result.add_class_arguments(task.Options, "proxy.options")
            result.set_defaults({f"proxy.{name}": value for name, value in proxies.defaults(task).items()})
        elif dataclasses.is_dataclass(field.type):
            result.add_class_arguments(field.type, field.name)
    return result.show(*USUAL)


def proxy_name(arguments: Sequence[str]) -> str:
    """The proxy task that a command line names, in a file or by ``--proxy.name``; what comes last counts.

    Raises:
        Refused: a file is no recipe.
    """
    name = Proxy().name
    for option, value in asked(arguments, "--config", "--proxy.name"):
        if option == "--proxy.name":
            name = value
        elif Path(value).is_file():  # if not, the parser says so
            name = str(load(Path(value)).get("proxy", {}).get("name", name))
    return name


def asked(arguments: Sequence[str], *options: str) -> Iterator[tuple[str, str]]:
    """(option, value) of some options of a command line, in order."""
    given = iter(arguments)
    for argument in given:
        option, mark, value = argument.partition("=")
        if option in options:
            yield option, value if mark else next(given, "")


def parse(arguments: Sequence[str]) -> Recipe:
    """Command line to a checked recipe.

    Raises:
        Refused: a field is unknown, of the wrong type, or impossible.
    """
    command = parser(arguments)
    return from_values(command.read(arguments), command)


def from_values(values: Any, command: Parser) -> Recipe:
    """What a parser returned, as a checked recipe whose `run` is set."""
    configs = [Path(str(path)) for path in values.pop("config", None) or []]
    made = command.instantiate(values)
    recipe = Recipe(**{f.name: made[f.name] for f in dataclasses.fields(Recipe) if f.name in made})
    recipe.run = as_run(run_folder(recipe, configs[-1] if configs else None))
    words = configs[-1].with_name("README.md") if configs else None
    if recipe.card.about is None and words and configs[-1].stem == "recipe" and words.exists():
        recipe.card.about = read_text(words).strip()
    check(recipe)
    return recipe


def run_folder(recipe: Recipe, config: Path | None = None) -> Path:
    """``--run`` if given, else the recipe's name under runs/."""
    if recipe.run:
        return named_folder(recipe.run)
    if config is not None:
        return named_folder(config.resolve().parent.name if config.stem == "recipe" else config.stem)
    name = f"{recipe.model.name}.{recipe.proxy.name}_{Path(recipe.data.called).stem}"
    return named_folder(re.sub(r"[^\w.-]+", "_", name))


def named_folder(run: str) -> Path:
    """The folder that ``--run`` names: a path, or a name under runs/."""
    return Path(run) if "/" in run else Path("runs") / run


def as_run(folder: Path) -> str:
    """The ``--run`` that names a folder."""
    return str(folder) if "/" in str(folder) else f"./{folder}"


def check(recipe: Recipe) -> None:
    """Refuse what two fields, or a field's limits beyond its type, make impossible.

    Raises:
        Refused: naming the field.
    """
    check_data(recipe.data, Path(recipe.run), recipe.evaluate.transfer)
    for phase in ("proxy", "relearn"):
        check_schedule(getattr(recipe, phase), f"{phase}.")
    if recipe.proxy.norm == "stored" and recipe.proxy.epochs and not recipe.model.pretrained:
        raise Refused(f"proxy.norm: {NO_STATISTICS}; start from weights, model.pretrained, or leave it at batch.")
    if recipe.relearn.norm == "stored" and recipe.relearn.reinit == "all":
        raise Refused(f"relearn.norm: {NO_STATISTICS}, as relearn.reinit all makes all of them; set it to batch.")
    if recipe.relearn.keep and recipe.relearn.reinit == "none":
        raise Refused(
            "relearn.keep: a share of what starts anew, and nothing does; give relearn.reinit high or all, too."
        )
    if recipe.relearn.epochs == 0:
        raise Refused("relearn.epochs: 0 leaves nothing to relearn; give at least a part of an epoch.")
    if not recipe.clusters.k:
        raise Refused("clusters.k: the list is empty; give at least one number of clusters.")
    if len(set(recipe.clusters.k)) < len(recipe.clusters.k):
        raise Refused(f"clusters.k: {recipe.clusters.k} names a number of clusters twice.")
    check_protocols(recipe.evaluate)


def check_protocols(settings: Evaluate) -> None:
    """Refuse protocols without anything to choose from.

    Raises:
        Refused: naming the field.
    """
    if not settings.linear_c or not settings.knn_k:
        raise Refused("evaluate.linear_c and evaluate.knn_k need at least one value each.")


def check_data(data: Data, written: Path | None = None, others: Collection[str] = ()) -> None:
    """Refuse data that nobody named, or of which what is written would become a part.

    Args:
        data: what is read.
        written: folder or file that is written to, with figures and tables.
        others: where other data are.

    Raises:
        Refused: naming the field.
    """
    if not data.path:
        raise Refused("data.path is missing: name a folder of images, parquet files or a data set of the Hub.")
    for path in (*data.paths, *others) if written else ():
        place = Path(path).expanduser()
        if place.is_dir() and written.resolve().is_relative_to(place.resolve()):
            raise Refused(
                f"{written} would lie in {path}, whose images and tables it would be among the next time; write to a "
                "place outside it."
            )


def check_schedule(schedule: Schedule, prefix: str = "") -> None:
    """Refuse impossible views and micro-batches of a schedule whose fields are named with `prefix`.

    Raises:
        Refused: naming the field.
    """
    views = schedule.views
    for name in ("crop_scale", "crop_ratio", "blur_sigma"):
        low, high = getattr(views, name)
        if low > high:
            raise Refused(f"{prefix}views.{name}: the lower limit {low} is above the upper limit {high}.")
    if views.crop_scale[1] > 1:
        raise Refused(f"{prefix}views.crop_scale: {views.crop_scale[1]} is a crop larger than the image, 1.")
    if views.hue > 0.5:
        raise Refused(f"{prefix}views.hue: {views.hue} is more than half the colour circle; at most 0.5.")
    if schedule.batch_size % schedule.accumulate:
        raise Refused(
            f"{prefix}accumulate: {schedule.accumulate} micro-batches do not divide {prefix}batch_size "
            f"{schedule.batch_size}."
        )


def short_name(model: str) -> str:
    """What to call a MODEL: its last part, with the one before it where that alone tells nothing."""
    parts = Path(model.split(":", 1)[-1]).parts or Path.cwd().parts
    known = re.fullmatch(r"hub|proxy|best|last|round_\d+", parts[-1])
    return "_".join(parts[-2:] if known else parts[-1:])


def guarded(command: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Run a command; what stops it is one sentence on stderr and an exit status.

    Returns:
        0; 1 for a failure; 2 for a wrong request; 128 + signal after a signal.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the start
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may have characters that a terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _guarded(command, arguments)
    except KeyboardInterrupt:  # what trains or measures hears signals itself
        return _say("stopped by SIGINT; the same command goes on from here", 128 + signal.SIGINT)


def _guarded(command: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    from .launch import Interrupted, end_processes, out_of_memory

    try:
        command(arguments)
        end_processes()
    except Refused as error:
        return _say(str(error), 2)
    except Failed as error:
        return _say(str(error), 1)
    except Interrupted as error:
        return _say(str(error), 128 + error.number)
    except OSError as error:
        if error.errno is None and not isinstance(error, FileNotFoundError):  # of a library that means something else
            raise
        told = f"{error.filename}: {reason(error)}" if error.filename else error.strerror or reason(error)
        return _say(moved(None) or f"{told}; what was finished is kept.", 1)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return _say("Out of memory; a smaller evaluate.batch_size or data.size needs less. Finished work is kept.", 1)
    return 0


def _say(text: str, status: int) -> int:
    text = "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text)  # names are anybody's
    for stream, said in ((sys.stdout, ""), (sys.stderr, f"error: {text}\n" if status < 128 else f"{text}\n")):
        try:
            stream.write(said)
            stream.flush()
        except OSError:  # a pipe that nobody reads any more, a log on a full disk: at exit, Python would try again
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status
