"""python -m training.evaluate MODEL --data.path DATA: how good the frozen features of any model that timm loads are."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .. import inputs, proxies, recipe, records, report
from ..command import Parser, check_data, check_protocols, guarded, model_parser, short_name
from ..files import Refused
from ..operations import on_device
from ..setup import check_split, load_transfer, tell_unprobed
from ..views import View
from . import Over, evaluate


def command() -> Parser:
    description = "Measure the frozen features of a model by the protocols that runs are measured by."
    parser = model_parser("evaluate", description, "[--residue TASK] [--out RECORDS.jsonl]", sizes=True)
    parser.add_argument("--residue", metavar="TASK", help="Also measure how well this task's views are told apart.")
    parser.add_argument("--out", help="File of records to add the figures to.")
    parser.add_class_arguments(recipe.Evaluate, "evaluate", skip={"every"})
    return parser


def main(arguments: Sequence[str]) -> None:
    parser = command()
    given = parser.read(arguments)
    made = parser.instantiate(given)
    check_data(made.data)
    check_protocols(made.evaluate)
    if given.out:
        records.check_out(Path(given.out))
    views = residue_of(given.residue) if given.residue is not None else ()
    with inputs.one_process("evaluate") as context:
        network = inputs.model(given.model, made.data.size)
        train, test = inputs.load_for(network, made.data, context, made.data.size)
        check_split(made.data, train)
        if told := inputs.shrunk(network, train):
            context.say(told)
        context.say(report.splits_line(train.account))
        transfer = load_transfer(made.evaluate.transfer, made.data, (train, test), context)
        tell_unprobed((train, test), transfer, made.evaluate, context)
        over = Over((train, test), views, transfer=transfer)
        found = evaluate(on_device(network, context.accelerator.device, train.size), made.evaluate, over, context)
        weights = inputs.weights_sha256(network)
        shared = {"arm": short_name(given.model), "model": given.model, "phase": "evaluate", "round": 0, "seed": None}
        rows = [
            {
                **shared,
                **row,
                "data": over.data(row.pop("of", made.data.called), row["split"]),
                "size": train.size,
                "weights_sha256": weights,
                "device": records.device_name(context.accelerator.device.type),
                "precision": "fp32",
                "versions": records.versions(),
            }
            for row in found
        ]
        tables = [lines for _, lines in report.tables(rows, [shared["arm"]], report.EVERY)]
        context.say("\n\n".join(map(report.as_text, tables + report.pooled_tables(rows, [shared["arm"]]))))
        if given.out:
            records.write(Path(given.out), rows)


def residue_of(task: str) -> tuple[View, ...]:
    """The views of a proxy task, for the probe that reads which of them an image was given.

    Raises:
        Refused: there is no such task, or its views are not a few that could be told apart.
    """
    proxies.find(task, "--residue")
    views = {name: proxies.residue(proxies.settings(name)) for name in proxies.PROXIES}
    if len(views[task]) < 2:
        those = ", ".join(name for name, own in views.items() if len(own) > 1)
        raise Refused(f"--residue: {task} gives images no few views that could be told apart; {those} do.")
    return views[task]


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
