"""What a policy sees turn by turn are the tokens that fine-tuning on the same conversation has."""

import json
from typing import Any

import numpy as np
import pytest

from k25_train.compose.resolve import compose
from k25_train.data.chat.chat_tokens import ChatTokens, Stretch
from k25_train.data.chat.messages import parse_conversation
from k25_train.data.tokenizer import Tokenizer, load_tokenizer
from k25_train.errors import RolloutError
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.episode import as_message
from k25_train.rollout.prompts import Prompts
from tests.helpers.tiny_shards import make_image, write_shard_set

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Looks.",
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
        },
    },
)
IMAGE = make_image(60, 50, "png", 3).data
CALL = {
    "id": "functions.look:0",
    "type": "function",
    "function": {"name": "look", "arguments": '{"at": "it"}'},
}
ASKED: dict[str, Any] = {"role": "user", "content": "What is there?"}
CALLED: dict[str, Any] = {
    "role": "assistant", "reasoning_content": "Look first.", "content": "I look.", "tool_calls": [CALL],
}  # fmt: skip
RESULT: dict[str, Any] = {
    "role": "tool", "tool_call_id": "functions.look:0",
    "content": [{"type": "text", "text": "This:"}, {"type": "image", "image": "0"}],
}  # fmt: skip
SAID: dict[str, Any] = {"role": "assistant", "reasoning_content": "A dog.", "content": "A dog."}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_shard_set(tmp_path_factory.mktemp("set") / "data", {"train": []}, chat_tokens=True)
    return load_tokenizer(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> Prompts:
    config = compose(["experiment=rl_smoke"])
    model = ServedModel(
        vocab_size=config.model.vocab_size, media_pad=tokenizer.media_pad, vision=config.model.vision
    )
    return Prompts(tokenizer, "tokenizer.json", model, 10_000)


def document(tokenizer: Tokenizer, messages: list[dict[str, Any]], *, thinking: bool) -> list[int]:
    """Ids of the document that fine-tuning has, one placeholder an image."""
    conversation = {
        "messages": messages, "tools": list(TOOLS),
        "chat_template_kwargs": {"thinking": thinking, "preserve_thinking": True},
    }  # fmt: skip
    parts = ChatTokens(tokenizer, "").documents(parse_conversation(json.dumps(conversation).encode()))[-1]
    image = [tokenizer.media_begin, *tokenizer.encode("image"), tokenizer.media_content, tokenizer.media_pad,
             tokenizer.media_end]  # fmt: skip
    return [token for part in parts for token in (part.tokens if isinstance(part, Stretch) else image)]


@pytest.mark.parametrize("thinking", [True, False])
def test_turns_and_what_is_between_are_the_document_of_the_conversation(
    tokenizer: Tokenizer, prompts: Prompts, thinking: bool
) -> None:
    said = [CALLED, SAID] if thinking else [{**each, "reasoning_content": ""} for each in (CALLED, SAID)]
    whole = document(tokenizer, [ASKED, said[0], RESULT, said[1]], thinking=thinking)
    opening = prompts.opening("t", [ASKED], (), TOOLS, thinking=thinking).token_ids
    following = prompts.following("t", [RESULT], (IMAGE,), thinking=thinking)
    assert following.media == (IMAGE,)
    # What the policy draws is what is left of it.
    assert tuple(whole[: len(opening)]) == opening
    start = next(
        place for place in range(len(opening), len(whole))
        if tuple(whole[place : place + len(following.token_ids)]) == following.token_ids
    )  # fmt: skip
    first, second = whole[len(opening) : start], whole[start + len(following.token_ids) :]
    assert first[-1] == second[-1] == tokenizer.chat_ids["<|im_end|>"]
    action = prompts.action(first, thinking=thinking)
    assert action.content == "I look." and action.reasoning == ("Look first." if thinking else "")
    assert [(call.id, call.name, dict(call.arguments)) for call in action.calls] == [
        ("functions.look:0", "look", {"at": "it"})
    ]
    again = document(tokenizer, [ASKED, dict(as_message(action)), RESULT, said[1]], thinking=thinking)
    assert again == whole, "a turn that was taken apart is the same message"
    assert prompts.action(second, thinking=thinking).content == "A dog."


def test_a_turn_that_ended_otherwise_gets_its_end(tokenizer: Tokenizer, prompts: Prompts) -> None:
    end = tokenizer.chat_ids["<|im_end|>"]
    plain = prompts.following("t", [ASKED], (), thinking=False)
    assert prompts.following("t", [ASKED], (), thinking=False, last_id=end) == plain
    late = prompts.following("t", [ASKED], (), thinking=False, last_id=tokenizer.eos)
    assert late.token_ids == (end, *plain.token_ids)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("no end of it", "endless thought"),
        ("</think>x<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0", "does not end"),
        ("</think><|tool_calls_section_begin|><|tool_call_begin|>look<|tool_call_argument_begin|>{}"
         "<|tool_call_end|><|tool_calls_section_end|>", "is not functions.NAME:NUMBER"),
        ("</think><|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>[]"
         "<|tool_call_end|><|tool_calls_section_end|>", "are no JSON object"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_has_a_fault_and_no_calls(
    tokenizer: Tokenizer, prompts: Prompts, text: str, fault: str
) -> None:
    ids: list[int] = []
    rest = text
    while rest:
        name = next((name for name in tokenizer.chat_ids if rest.startswith(name)), rest[0])
        ids += [tokenizer.chat_ids[name]] if name in tokenizer.chat_ids else tokenizer.encode(name)
        rest = rest[len(name) :]
    action = prompts.action([*ids, tokenizer.chat_ids["<|im_end|>"]], thinking=True)
    assert fault in action.fault and not action.calls


def test_results_are_cut_in_the_middle_and_say_so(tokenizer: Tokenizer, prompts: Prompts) -> None:
    long = " ".join(map(str, range(2_000)))
    for content in (long, [{"type": "text", "text": long}, {"type": "image", "image": "0"}]):
        cut = prompts.shortened({**RESULT, "content": content}, 100)["content"]
        text = cut if isinstance(cut, str) else cut[0]["text"]
        assert text.startswith("0 1 2") and text.endswith("1999") and "tokens left out" in text
        assert 50 <= len(tokenizer.encode(text)) <= 130
    assert prompts.shortened(RESULT, 100)["content"] == RESULT["content"]


def test_images_expand_and_collapse(tokenizer: Tokenizer, prompts: Prompts) -> None:
    observed = prompts.following("t", [RESULT, RESULT], (IMAGE, IMAGE), thinking=False)
    expanded = prompts.expanded(observed.token_ids, observed.media)
    assert prompts.num_media(expanded) == 2 and len(expanded) > len(observed.token_ids)
    assert prompts.collapsed(expanded) == observed.token_ids
    assert prompts.collapsed(np.zeros(0, np.int32)) == ()


def test_what_is_no_conversation_names_the_task(prompts: Prompts) -> None:
    with pytest.raises(RolloutError, match=r"task t: its messages are no conversation"):
        prompts.following("t", [{"role": "nobody", "content": "."}], (), thinking=False)
    small = Prompts.__new__(Prompts)
    small.__dict__ |= prompts.__dict__ | {"_max_tokens": 3}
    with pytest.raises(RolloutError, match=r"task t: its prompt has \d+ tokens, rollout.max_prompt_tokens=3"):
        small.opening("t", [ASKED], (), (), thinking=False)
