"""The environment `tools` in real sandboxes: calls, what is wrong with them, and what is left for a judge."""

import asyncio
import io
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from k25_train.environments.base import Response, Status, Task, Verdict, scored
from k25_train.environments.environment import Action, EnvironmentFaultError, Services
from k25_train.environments.sandboxes.base import SandboxError
from k25_train.environments.tool_environment import ToolEnvironment, cut
from k25_train.environments.toolsets import python
from k25_train.errors import ConfigError
from tests.helpers.sandboxes import needs_bubblewrap
from tests.helpers.tool_episodes import NoJudges, action, called, sandboxes, text_of


def picture(width: int = 200, height: int = 100) -> bytes:
    """A red picture with a blue square in it."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (10, 10, 40, 40))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def task(**setup: Any) -> Task:
    """A task with tools in a sandbox, and a picture."""
    return Task(
        key="tools/1",
        family="tools",
        messages=({"role": "user", "content": "Do it."},),
        media=(picture(),),
        judge="mine",
        environment="tools",
        setup={"toolsets": {"shell": {}, "files": {}}, **setup},
        needs_sandbox=True,
    )


class Seen:
    """A judge that keeps what it sees."""

    def __init__(self) -> None:
        self.files: list[dict[str, bytes]] = []

    async def judge(self, task: Task, response: Response) -> Verdict:
        """1."""
        self.files.append(dict(response.files))
        return scored(1.0, {})


def in_environment[T](
    made: Task, use: Callable[[ToolEnvironment], Awaitable[T]], judging: Any = None, timeout_s: float = 20.0
) -> T:
    """What `use` makes of an environment that was reset."""

    async def run() -> T:
        opened = sandboxes()
        services = Services(sandboxes=opened, judging=judging or NoJudges(), tool_timeout_s=timeout_s)
        environment = ToolEnvironment(made, services)
        try:
            await environment.reset()
            return await use(environment)
        finally:
            await environment.close()
            await environment.close()
            await opened.close()

    return asyncio.run(run())


@needs_bubblewrap
def test_files_and_commands_are_of_one_sandbox() -> None:
    async def use(environment: ToolEnvironment) -> None:
        assert text_of(await called(environment, "read_file", path="a/b.txt")) == "1\tone\n2\ttwo"
        shown = await called(environment, "read_file", path="p.png")
        assert len(shown.media) == 1 and shown.messages[0]["content"][1] == {"type": "image", "image": "0"}
        await called(environment, "edit_file", path="a/b.txt", old="two", new="2")
        assert text_of(await called(environment, "shell", command="cat a/b.txt; exit 3")) == (
            "one\n2\n[exit status 3]"
        )
        for wrong, words in (("none", "no such file"), ("a", "a")):
            assert words in text_of(await called(environment, "read_file", path=wrong))
        assert "3 times" in text_of(await called(environment, "edit_file", path="c", old="x", new="y"))
        assert text_of(await called(environment, "list_files", path=".")) == "a/\nc\np.png"

    in_environment(task(files={"a/b.txt": "one\ntwo\n", "p.png": {"media": 0}, "c": "xxx"}), use)


@needs_bubblewrap
def test_what_is_wrong_with_a_call_is_told() -> None:
    async def use(environment: ToolEnvironment) -> None:
        assert "no tool nothing" in text_of(await called(environment, "nothing"))
        assert "command is missing" in text_of(await called(environment, "shell"))
        assert "must be string, not integer" in text_of(await called(environment, "shell", command=3))
        assert "path is no argument" in text_of(await called(environment, "shell", command="", path=""))
        assert "killed after 1 s" in text_of(await called(environment, "shell", command="sleep 30"))
        seen = await environment.step(Action(content="", fault="malformed tool call"))
        assert seen.messages[0]["role"] == "user" and not seen.done
        assert (await environment.step(Action(content="I am done."))).done
        many = await environment.step(action(0, *[("shell", {"command": "true"})] * 17))
        assert text_of(many, 15) == "[no output]" and "not called" in text_of(many, 16)

    in_environment(task(), use, timeout_s=1.0)


@needs_bubblewrap
def test_judges_get_what_is_left_when_nothing_runs_any_more_and_the_same_again() -> None:
    seen = Seen()

    async def use(environment: ToolEnvironment) -> None:
        loop = "setsid sh -c 'while :; do date +%N > clock; done' >/dev/null 2>&1 &"
        await called(environment, "shell", command=f"{loop} sleep 0.1; ln -s /etc/passwd link; echo 1 > out")
        response = Response(text="Done.", num_tokens=1, ended=True)
        for _ in range(2):
            assert (await environment.judge(response)).reward == 1.0
        assert seen.files[0].keys() == {"clock", "out"}
        assert seen.files[0] == seen.files[1]

    in_environment(task(), use, seen)


@needs_bubblewrap
def test_too_much_left_has_failed() -> None:
    async def use(environment: ToolEnvironment) -> Verdict:
        await called(environment, "shell", command="head -c 100000 /dev/zero > big")
        return await environment.judge(Response(text="Done.", num_tokens=1, ended=True))

    verdict = in_environment(task(left_bytes=10_000), use)
    assert (verdict.status, verdict.kind) == (Status.FAILED, "too much left")


@needs_bubblewrap
def test_a_sandbox_that_cannot_be_prepared_is_a_fault_and_a_history_is_forgotten() -> None:
    with pytest.raises(EnvironmentFaultError, match=r"status 3.*nothing to do"):
        in_environment(task(prepare=["echo nothing to do >&2; exit 3"]), NoJudges().judge)  # type: ignore[arg-type]
    make = (
        "git init -q r && cd r && git config user.email a@b && git config user.name a && echo 1 > a && "
        "git add -A && git commit -qm secret && echo 2 > a && git commit -qam second && git stash -q; true"
    )

    async def count(environment: ToolEnvironment) -> str:
        return text_of(await called(environment, "shell", command="cd r && git log --all --format=%s; cat a"))

    assert in_environment(task(prepare=[make]), count) == "start\n2"
    assert in_environment(task(prepare=[make], keeps_history=True), count) == "second\nsecret\n2"


@needs_bubblewrap
def test_names_of_tools_are_those_of_the_task() -> None:
    async def use(environment: ToolEnvironment) -> None:
        names = [each["function"]["name"] for each in environment.tools]
        assert names == ["bash", "read_file", "write_file", "edit_file", "list_files"]
        assert environment.tools[0]["function"]["parameters"]["required"] == ["cmd"]
        assert text_of(await called(environment, "bash", cmd="echo 1")) == "1"
        assert "no tool shell" in text_of(await called(environment, "shell", command="echo 1"))
        assert "cmd is missing" in text_of(await called(environment, "bash", command="echo 1"))

    in_environment(task(tools={"shell": {"name": "bash", "arguments": {"command": "cmd"}}}), use)


@needs_bubblewrap
def test_cells_keep_variables_and_show_images() -> None:
    async def use(environment: ToolEnvironment) -> None:
        async def cell(code: str) -> Any:
            return await called(environment, "python", code=code)

        seen = await cell("from PIL import Image\nimage = Image.open('p.png')\nimage.crop((0, 0, 50, 50))")
        with Image.open(io.BytesIO(seen.media[0])) as shown:
            assert shown.size == (50, 50) and shown.getpixel((20, 20)) == (0, 0, 255)
        seen = await cell("half = image.resize((100, 50)); display(half); display(half.convert('L'))")
        assert len(seen.media) == 2
        blue = "sum(1 for pixel in image.convert('RGB').getdata() if pixel == (0, 0, 255))"
        assert text_of(await cell(blue)).splitlines()[-1] == "900"
        assert "ZeroDivisionError" in text_of(await cell("1 / 0"))

    in_environment(task(toolsets={"python": {}}, files={"p.png": {"media": 0}}), use)


@needs_bubblewrap
def test_no_session_is_a_fault_until_the_policy_has_acted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python, "_COMMAND", ["/bin/false"])
    made = task(toolsets={"python": {}, "shell": {}})

    async def at_once(environment: ToolEnvironment) -> None:
        with pytest.raises(SandboxError, match="no IPython kernel"):
            await called(environment, "python", code="1")

    async def afterwards(environment: ToolEnvironment) -> str:
        await called(environment, "shell", command="true")
        return text_of(await called(environment, "python", code="1"))

    in_environment(made, at_once)
    assert "no session can be started any more" in in_environment(made, afterwards)


@needs_bubblewrap
@pytest.mark.slow
def test_cells_that_do_not_end_cost_the_variables_at_most() -> None:
    async def use(environment: ToolEnvironment) -> None:
        async def cell(code: str) -> Any:
            return await called(environment, "python", code=code)

        await cell("from PIL import Image; image = Image.open('p.png')")
        assert "interrupted after 5 s" in text_of(await cell("while True: pass"))
        assert text_of(await cell("image.size")) == "(200, 100)"
        assert "variables are gone" in text_of(await cell("import os; os._exit(1)"))
        assert "NameError" in text_of(await cell("image"))

    in_environment(task(toolsets={"python": {}}, files={"p.png": {"media": 0}}), use, timeout_s=5.0)


def test_a_setup_that_is_not_right_is_refused_with_the_task() -> None:
    services = Services(sandboxes=None, judging=NoJudges(), tool_timeout_s=1.0)  # type: ignore[arg-type]
    wrong: list[tuple[Task, str]] = [
        (task(toolsets={"nothing": {}}), "toolset 'nothing': there is none"),
        (task(toolsets={"shell": {"color": 1}}), "it has no color"),
        (task(more=1), "it has no more"),
        (task(files={"../x": ""}), "does not lie in /work"),
        (task(files={"x": {"media": 1}}), "IndexError"),
        (replace(task(), needs_sandbox=False), "needs_sandbox=True"),
    ]
    for made, words in wrong:
        with pytest.raises(ConfigError, match=f"(?s)task tools/1: its (setup|tools).*{words}"):
            ToolEnvironment(made, services)


def test_long_results_lose_their_middle() -> None:
    assert cut("abc", 20) == "abc"
    text = cut("ä" * 1000, 100)
    assert text.startswith("ä" * 25 + "\n[1900 bytes left out]\n") and text.endswith("ä" * 25)
