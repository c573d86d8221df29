"""`k25-rollout show`: the responses to a task as text, with log-probabilities, versions and rewards."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from k25_train.data.open_sources import tokenizer_path
from k25_train.data.tokenizer import Tokenizer, load_tokenizer
from k25_train.errors import RolloutError
from k25_train.rollout.journal import journal_files
from k25_train.rollout.overview.groups import (
    JOURNAL,
    ROLLOUTS,
    UNDER_WAY,
    ShownBranch,
    ShownGroup,
    ShownResponse,
    groups_of_run,
)
from k25_train.rollout.overview.html_page import page
from k25_train.rollout.records import records_in
from k25_train.rollout.response_records import MEDIUM


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "show",
        help="the responses to a task, token by token",
        description=(__doc__ or "").partition(":")[2].strip(),
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run of k25-rl")
    parser.add_argument("task", metavar="TASK", help="key of a task, or number of a group")
    parser.add_argument("--tokenizer", metavar="FILE", help="vocabulary (that of the run)")
    parser.add_argument("--tokens", action="store_true", help="a line for each token")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page for a browser instead")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Print them; returns the exit status."""
    found = [
        group
        for group in groups_of_run(options.run_folder)
        if options.task in (group.task, str(group.number))
    ]
    if not found:
        raise RolloutError(
            f"{options.run_folder}: has no group of {options.task}: `k25-rollout list` shows which there are"
        )
    tokenizer = load_tokenizer(options.tokenizer or _tokenizer_of(options.run_folder))
    if options.html is not None:
        images = _images_of(options.run_folder, {group.number for group in found})
        options.html.write_text(page(found, images, tokenizer.decode), encoding="utf-8")
        _print(console, f"{options.html}: {len(found)} {'group' if len(found) == 1 else 'groups'}")
        return 0
    for group in found:
        _show(group, tokenizer, console, tokens=options.tokens)
    return 0


def _images_of(run_folder: Path, numbers: set[int]) -> dict[int, list[bytes]]:
    """Images that the responses of groups have seen, as far as the journal still has them."""
    found: dict[int, list[bytes]] = {}
    for path in journal_files(run_folder / ROLLOUTS / JOURNAL):
        for record, _ in records_in(path.read_bytes()):
            header = record.header
            if header["kind"] == MEDIUM and header["group"] in numbers:
                found.setdefault(header["group"], []).append(record.arrays["content"].tobytes())
    return {number: list(dict.fromkeys(images)) for number, images in found.items()}


def _tokenizer_of(run_folder: Path) -> str:
    # What reads configurations is not needed for a vocabulary that is named.
    from k25_train.compose.command_line import load_saved

    return tokenizer_path(load_saved(run_folder / "config.yaml").data)


def _show(group: ShownGroup, tokenizer: Tokenizer, console: Console, *, tokens: bool) -> None:
    when = "in progress" if group.step == UNDER_WAY else f"step {group.step}"
    _print(console, f"group {group.number}, task {group.task}, {when}")
    first = next((response.branches[0] for response in group.responses if response.branches), None)
    if first is not None:
        prompt = first.token_ids[: first.num_opening].tolist()
        _print(console, f"prompt ({len(prompt)} tokens): {tokenizer.decode(prompt)}")
    for sample, response in enumerate(group.responses):
        _print(console, f"\nresponse {sample}: {_worth(response)}")
        for number, branch in enumerate(response.branches):
            _show_branch(number, branch, tokenizer, console, tokens=tokens)
    _print(console, "")


def _show_branch(
    number: int, branch: ShownBranch, tokenizer: Tokenizer, console: Console, *, tokens: bool
) -> None:
    """What is behind its prompt, and behind what another branch has."""
    start = branch.num_shared if number else branch.num_opening
    if number:
        _print(console, f"branch {number}, behind {branch.num_shared} tokens that are shared:")
    _print(console, tokenizer.decode(branch.token_ids[start:].tolist()))
    for position in range(start, len(branch.token_ids) if tokens else start):
        token = int(branch.token_ids[position])
        text = tokenizer.decode([token])
        drawn = f"{branch.logprobs[position]:9.4f}  version {branch.versions[position]:5}"
        how = drawn if branch.generated[position] else "observed".rjust(len(drawn))
        _print(console, f"  {position - branch.num_opening:5} {token:7} {how}  {text!r}")


def _worth(response: ShownResponse) -> str:
    facts = response.facts
    parts = ", ".join(f"{name} {value:.3g}" for name, value in facts["parts"].items())
    reward = "no reward yet" if facts["reward"] is None else f"reward {facts['reward']:.3g}"
    words = [
        f"{reward} ({parts})" if parts else reward,
        f"{response.num_drawn} tokens",
        f"ended by {facts['finish_reason']}" if facts["finish_reason"] else "not begun",
    ]
    if facts.get("turns", 1) > 1:
        words.append(f"{facts['turns']} turns")
    if facts.get("attempt", 0):
        words.append(f"attempt {facts['attempt']}")
    if "trained_reward" in facts and facts["trained_reward"] != facts["reward"]:
        words.append(f"trained with reward {facts['trained_reward']:.3g}")
    if len(response.logprobs):
        words.append(f"mean log-probability {response.logprobs.mean():.3f}")
        words.append(f"weights of steps {response.versions.min()} to {response.versions.max()}")
    if facts["reason"]:
        words.append(facts["reason"])
    return ", ".join(words)


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
