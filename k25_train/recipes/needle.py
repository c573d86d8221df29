"""`python -m k25_train.recipes.needle checkpoint=RUN [length=4096] [data=FOLDER] [out=FILE] [key=value …]`

Needles in a haystack: how many facts in long documents of real text a checkpoint finds again. Of a run
its newest checkpoint, or the one that is named. `length` is that of the documents in tokens, of which
`k25-data needles` has made a set in `data` (datasets/needles). `out` takes the scores as JSON.

A needle is found if its answer is the most likely of all tokens behind its question; its margin is how far
it is ahead, in log-probability, of the likeliest other answer. No fact that is trained on is about the words
of needles. The run's own configuration is used, in any layout: by default every process is a data-parallel
replica.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from k25_train.checkpoint import folders
from k25_train.checkpoint.commands.choice import chosen
from k25_train.checkpoint.continuity import saved_config
from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.data.source import ThreadSource
from k25_train.data.tokenizer import load_tokenizer
from k25_train.entry import run_command
from k25_train.errors import ConfigError, DataError
from k25_train.eval import print_line, read_arguments
from k25_train.joining.environment import speaks
from k25_train.startup.determinism import prepare_determinism
from k25_train.startup.platform import prepare_device

OWN = ("length", "data", "out")
"""Arguments that are neither the checkpoint nor settings of its run."""
DATA, LENGTH = "datasets/needles", 4096
WORDS = "words.json"
"""Next to the sets: the answers, and at how many depths they are."""
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthScore:
    """What was found at one depth."""

    depth: float
    """Where the needle is in its document, from 0 to 1."""
    needles: int
    """How many were asked for."""
    found: float
    """Share of them whose answer is the most likely token."""
    margin: float
    """Mean difference of log-probabilities, in nats, between the answer and the likeliest other one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleScore:
    """What a checkpoint finds in documents of one length."""

    length: int
    """Tokens of a document."""
    depths: tuple[DepthScore, ...]
    """From the beginning to the end."""

    @property
    def found(self) -> float:
        """Share of all needles that are found."""
        return sum(each.found * each.needles for each in self.depths) / sum(
            each.needles for each in self.depths
        )

    @property
    def margin(self) -> float:
        """Mean margin of all needles."""
        total = sum(each.needles for each in self.depths)
        return sum(each.margin * each.needles for each in self.depths) / total

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {"found": self.found, "margin": self.margin, **asdict(self)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "NeedleScore":
        """What `to_json` wrote."""
        return cls(length=values["length"], depths=tuple(DepthScore(**each) for each in values["depths"]))


def by_depth(length: int, num_depths: int, sums: Sequence[Sequence[float]]) -> NeedleScore:
    """Scores by depth. The answer with number n is at depth n modulo `num_depths`.

    Args:
        sums: of each answer, how often it was asked for, how often found, and the sum of its margins.

    Raises DataError if a depth has no needle.
    """
    found = []
    for number in range(num_depths):
        asked, hits, margin = (sum(column) for column in zip(*sums[number::num_depths], strict=True))
        if not asked:
            raise DataError(f"length={length}: there is no needle at depth {number + 1} of {num_depths}")
        depth = number / max(num_depths - 1, 1)
        found.append(DepthScore(depth=depth, needles=int(asked), found=hits / asked, margin=margin / asked))
    return NeedleScore(length=length, depths=tuple(found))


def search(
    config: Config, checkpoint: Any, words: Sequence[int], num_depths: int, trained_with: float
) -> NeedleScore:
    """Search the held-out documents of `config`. Called by every rank, all of which get the score.

    `trained_with` is YaRN's factor of the checkpoint, which `config` may exceed.
    """
    data = ThreadSource(config)
    prepare_determinism(config.train, config.cluster)
    device = prepare_device(config.cluster)
    # The modules below import megatron-core, which must find the platform chosen.
    from k25_train.checkpoint.agreement import on_first_rank
    from k25_train.checkpoint.loading import load
    from k25_train.training.needles import needle_sums
    from k25_train.training.run import build_run
    from parallel.topology import stop_process_group

    config = replace(config, optim=replace(config.optim, offload=OptimizerOffload.none))
    run = build_run(config, device, data, trains=False)
    checkpoint = on_first_rank(lambda: checkpoint)
    with run.data:
        rope = replace(config.model.rope, scaling_factor=trained_with)
        trained = replace(config, model=replace(config.model, rope=rope))
        step = load(checkpoint, trained, run.modules, optimizer=None)
        sums = needle_sums(run, config.train.eval_sequences, words)
    score = by_depth(config.train.seq_len, num_depths, sums.tolist())
    if run.is_main:
        print_line(f"{checkpoint}: step {step}, documents of {score.length:,} tokens")
        for line in lines_of(score):
            print_line(line)
    stop_process_group()
    return score


def lines_of(score: NeedleScore) -> list[str]:
    """The score as a table."""
    rows = [
        f"{each.depth:5.0%}  {each.needles:7}  {each.found:6.0%}  {each.margin:+7.2f}"
        for each in score.depths
    ]
    total = sum(each.needles for each in score.depths)
    return [
        "depth  needles   found   margin",
        *rows,
        f"  all  {total:7}  {score.found:6.0%}  {score.margin:+7.2f}",
    ]


def main() -> None:
    """Console entry point."""
    run_command(_run)


def _run() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    own: dict[str, str] = {}
    rest = []
    for argument in sys.argv[1:]:
        name, equals, value = argument.partition("=")
        if equals and name in OWN:
            own[name] = value
        else:
            rest.append(argument)
    length = own.get("length", str(LENGTH))
    folder = Path(own.get("data", DATA))
    if not length.isdecimal() or not (folder / f"needles_{length}").is_dir():
        known = sorted(path.name.removeprefix("needles_") for path in folder.glob("needles_*"))
        found = f"has needles of {', '.join(known)}" if known else "has no needles"
        raise ConfigError(
            f"length={length}: {folder} {found if folder.is_dir() else 'is no folder'}\n"
            f"  -> make them: python -m k25_train.data needles --out {folder} --length {length}"
        )
    answers = json.loads((folder / WORDS).read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(folder / f"needles_{length}" / TOKENIZER)
    words = [tokenizer.encode(word)[0] for word in answers["values"]]
    stretch, original = trained_stretch(rest)
    more = settings(folder, length)
    if original and int(length) > original * stretch:
        # How far a model gets whose context is stretched without training.
        more.append(f"model.rope.scaling_factor={int(length) / original}")
    config, checkpoint, *_ = read_arguments([*more, *rest])
    score = search(config, checkpoint, words, answers["depths"], stretch)
    if (out := own.get("out")) and speaks():
        Path(out).write_text(json.dumps(score.to_json(), indent=1) + "\n", encoding="utf-8")


def trained_stretch(arguments: Sequence[str]) -> tuple[float, int]:
    """By how much YaRN stretched the context of the checkpoint that the arguments name, and how long it was;
    1 and 0 where no checkpoint is named. Raises as `chosen`."""
    named = [each.removeprefix("checkpoint=") for each in arguments if each.startswith("checkpoint=")]
    if not named or not named[-1]:
        return 1.0, 0
    rope = saved_config(chosen(named[-1]).folder / folders.CONFIG).get("model", {}).get("rope", {})
    return float(rope.get("scaling_factor", 1.0)), int(rope.get("original_max_position", 0))


def settings(folder: Path, length: str) -> list[str]:
    """What a search has otherwise than the run that it is of."""
    source = f"{{needles: {{format: shards, path: {folder / f'needles_{length}'}}}}}"
    return [
        f"train.seq_len={length}",
        "train.micro_batch_size=1",
        "train.eval_sequences=16",
        "data.dir=.",
        f"data.sources={source}",
        "data.schedule={}",
        "data.vision_ratio=null",
    ]


if __name__ == "__main__":
    main()
