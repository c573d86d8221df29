"""`python -m k25_train.rl.report RUN`: what came of a run of reinforcement learning, for people.

    RUN/rl.png               reward, accuracy, tokens per answer, and how far engine and trainer are apart
    RUN/conversations.html   held-out tasks, answered before the first step and after the last

Prints a table of the first and the last evaluation.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from k25_train.entry import run_command
from k25_train.errors import DataError
from k25_train.metrics.conversations_page import page
from k25_train.metrics.rl_plot import plot_run
from k25_train.metrics.sinks import Row, number, read_rows
from k25_train.rl.conversations import evaluations, read_answers
from k25_train.tables import fitting_table

ROLLOUTS = "rollouts"
SHOWN = 40
"""Most conversations of the page. Our choice."""
WORDS = "held-out tasks"
FIGURES = {
    "eval_reward": "reward",
    "eval_accuracy": "accuracy",
    "eval_response_tokens": "tokens per answer",
}
"""Key of the rows of evaluations -> its words."""


def main() -> None:
    """Run the command with the process's arguments."""
    run_command(_run)


def write_report(run: Path, console: Console) -> None:
    """Write picture and page into a run's folder, and print the table.

    Raises DataError if the folder holds no rows of reinforcement learning.
    """
    rows = read_rows(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    evaluated = [row for row in rows if "eval_reward" in row]
    if not evaluated:
        raise DataError(
            f"{run}: holds no evaluation of rollouts: name the run.dir of `python -m k25_train.rl`, with "
            "rollout.eval_tasks above 0"
        )
    console.print(
        fitting_table(str(run), table_rows(evaluated[0], evaluated[-1]), console.width, left=(WORDS,))
    )
    plot_run(rows, run / "rl.png", f"{run.name}: {last_step(rows):,.0f} steps")
    print(f"picture: {run / 'rl.png'}")
    files = evaluations(run / ROLLOUTS)
    if len(files) > 1:
        first, *_, last = files
        before, after = read_answers(files[first])[:SHOWN], read_answers(files[last])
        facts = {
            "run": str(run),
            "before": f"step {first}: {_said(evaluated[0])}",
            "after": f"step {last}: {_said(evaluated[-1])}",
        }
        text = page("Held-out tasks, before and after", facts, before, after)
        (run / "conversations.html").write_text(text, encoding="utf-8")
        print(f"conversations: {run / 'conversations.html'}")


def last_step(rows: Sequence[Row]) -> float:
    """The last step that was trained."""
    return max((number(row["step"]) for row in rows), default=0)


def table_rows(before: Row, after: Row) -> list[dict[str, str]]:
    """A row for each figure of two evaluations."""
    return [
        {
            WORDS: words,
            f"step {before['step']}": f"{number(before[key]):.3f}",
            f"step {after['step']}": f"{number(after[key]):.3f}",
            "change": f"{number(after[key]) - number(before[key]):+.3f}",
        }
        for key, words in FIGURES.items()
        if key in before and key in after
    ]


def _said(row: Row) -> str:
    return ", ".join(f"{words} {number(row[key]):.3f}" for key, words in FIGURES.items() if key in row)


def _run() -> None:
    parser = argparse.ArgumentParser(prog="python -m k25_train.rl.report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    write_report(parser.parse_args().run, Console(soft_wrap=True))


if __name__ == "__main__":
    main()
