"""python -m training.predict MODEL --data.path NEW --out predictions.csv: the class of every image of any folder."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from . import classifier, inputs, recipe, tables
from .command import Parser, check_data, guarded, model_parser
from .guesses import SHOWN, sheet, short
from .images import Images
from .limits import PositiveInt
from .operations import on_device

ENDINGS = (".csv", ".parquet")
Doubt = tuple[float, Images, int, str]  # probability of the likeliest class, image, caption


def command() -> Parser:
    description = "Write the likeliest class of images and its probability, as a table; no labels are needed."
    parser = model_parser("predict", description, "--out OUT.csv", inputs.UNUSED)
    parser.add_argument("--out", required=True, help="The table to write: .csv or .parquet, as its ending says.")
    parser.add_argument("--batch_size", type=PositiveInt, default=256, help="Images of a forward pass.")
    return parser


def main(arguments: Sequence[str]) -> None:
    parser = command()
    given = parser.read(arguments)
    data: recipe.Data = parser.instantiate(given).data
    out = Path(given.out)
    check_data(data, out)
    tables.check(out, ENDINGS, data.paths)
    with inputs.one_process("predict") as context:
        network = inputs.model(given.model, head=True)
        network = on_device(network, context.accelerator.device, inputs.own_size(network))
        names = classifier.label_names(network)
        doubts: list[Doubt] = []
        said: Counter[str] = Counter()

        def parts() -> Iterator[pa.Table]:
            splits, images = inputs.every_split(network, data, context)
            for split, found in zip(splits, images, strict=True):
                told = classifier.answers(network, found, found.all, context, given.batch_size)
                said.update(names[number] for number in told.guess.tolist())
                doubts.extend(doubtful(told, names))
                table = told.table(split, names)
                yield table if len(splits) > 1 else table.drop_columns("split")

        count = tables.write(out, parts())
        picture = out.with_name(f"{out.stem}_least_certain.png")
        least = sorted(doubts, key=lambda doubt: doubt[0])[:SHOWN]
        title = f"Of {said.total():,} images, the {len(least)} that the classifier is least certain of"
        sheet(picture, [doubt[1:] for doubt in least], title)
        bad = f", {count - said.total()} of them null: not decodable" if count > said.total() else ""
        most = ", ".join(f"{name} {number}" for name, number in said.most_common(8))
        context.say(f"{count} rows in {out}{bad}; the least certain are shown in {picture}")
        context.say(f"{most}{', …' if len(said) > 8 else ''}")


def doubtful(told: classifier.Answers, names: list[str]) -> list[Doubt]:
    """The images of which a classifier is least certain, each with the two likeliest classes."""
    sure, likeliest = told.probabilities.topk(min(2, len(names)), 1)
    found = []
    for row in sure[:, 0].argsort(stable=True)[:SHOWN].tolist():
        pairs = zip(likeliest[row].tolist(), sure[row].tolist(), strict=True)
        caption = "\n".join(f"{short(names[number])} {100 * share:.0f} %" for number, share in pairs)
        found.append((sure[row, 0].item(), told.images, int(told.indices[row]), caption))
    return found


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
