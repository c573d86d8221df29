"""What a chain has come to: a table of its stages, and a picture of all losses over all tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from k25_train.metrics.chain_plot import StageRows, plot_chain, text_key
from k25_train.metrics.sinks import Row, number, read_rows
from k25_train.recipes.chain import Chain
from k25_train.recipes.composed import Composed
from k25_train.recipes.needle import NeedleScore
from k25_train.recipes.needle_stages import read_scores
from k25_train.tables import fitting_table

PICTURE, TABLE = "losses.png", "table.txt"
"""In the folder of the chain."""
_WIDTH = 120
_NONE = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A stage that has run."""

    name: str
    """Of the stage."""
    rows: tuple[Row, ...]
    """Its metrics."""
    needles: dict[int, NeedleScore]
    """Length of documents -> what was found at its end."""

    @property
    def tokens(self) -> int:
        """Tokens of its steps."""
        return sum(round(number(row["tokens"])) for row in self.rows if "tokens" in row)

    def before_and_after(self, key: str) -> tuple[float, float] | None:
        """The first and the last value of a figure; None without one."""
        values = [number(row[key]) for row in self.rows if key in row]
        return (values[0], values[-1]) if values else None

    @property
    def seconds(self) -> float:
        """Time of its steps."""
        return sum(number(row["step_time_s"]) for row in self.rows if "step_time_s" in row)


def results_of(chain: Chain, stages: Sequence[Composed]) -> list[Result]:
    """What each stage has written."""
    return [
        Result(
            name=each.stage.name,
            rows=tuple(read_rows(Path(each.config.run.dir) / "metrics.jsonl")),
            needles=read_scores(chain, each),
        )
        for each in stages
    ]


def write_results(chain: Chain, stages: Sequence[Composed], console: Console) -> None:
    """Print the table, and write it and the picture to the chain's folder."""
    results = results_of(chain, stages)
    folder = Path(chain.dir)
    table = fitting_table(f"chain {chain.name}", table_rows(results), _WIDTH, left=("stage",))
    with (folder / TABLE).open("w", encoding="utf-8") as file:
        Console(file=file, width=_WIDTH).print(table)
    console.print(table)
    needles = {
        each.name: {length: score.found for length, score in each.needles.items()}
        for each in results
        if each.needles
    }
    plot_chain(
        [StageRows(each.name, each.rows) for each in results],
        needles,
        folder / PICTURE,
        f"Chain {chain.name}",
    )
    console.print(f"picture and table: {folder / PICTURE}, {folder / TABLE}", highlight=False)


def table_rows(results: Sequence[Result]) -> list[dict[str, str]]:
    """The table's rows; losses are before -> after."""
    lengths = sorted({length for each in results for length in each.needles})
    return [
        {
            "stage": each.name,
            "tokens": f"{each.tokens:,}",
            "loss": _pair(each.before_and_after("loss")),
            "held-out text": _pair(each.before_and_after(text_key(each.rows))),
            "held-out captions": _pair(each.before_and_after("eval_caption_loss")),
            **{
                f"needles {length:,}": f"{each.needles[length].found:.0%}"
                if length in each.needles
                else _NONE
                for length in lengths
            },
            "time": f"{each.seconds:.0f} s",
        }
        for each in results
    ]


def _pair(values: tuple[float, float] | None) -> str:
    return _NONE if values is None else f"{values[0]:.2f} → {values[1]:.2f}"
