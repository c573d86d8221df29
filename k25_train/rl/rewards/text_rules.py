"""Every rule by its name: an answer and the task's reference in, a verdict out.

Pure functions without torch. They raise ResponseFaultError (the verdict is then `failed`), TaskFaultError and
ValueError (the task is at fault: `unscored`); `apply_rule` makes verdicts of them.

What a reference holds is in the table of the README.
"""

import base64
import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from k25_train.environments.base import ACCURACY, Verdict, failed, scored, unscored
from k25_train.environments.families import logic
from k25_train.rl.rewards import extraction
from k25_train.rl.rewards.faults import (
    MAX_FILE_BYTES,
    ResponseFaultError,
    TaskFaultError,
    needed,
    number_of,
)
from k25_train.rl.rewards.rules.answers import (
    choice_in,
    choice_match,
    number_in,
    number_match,
    text_match,
)
from k25_train.rl.rewards.rules.boxes import IOU_FLOOR, box_f1
from k25_train.rl.rewards.rules.counting import count_closeness
from k25_train.rl.rewards.rules.edit_distance import ocr_similarity
from k25_train.rl.rewards.rules.left_files import expected_files, left_files
from k25_train.rl.rewards.rules.points import point_f1
from k25_train.rl.rewards.rules.polygons import polygon_iou

Rule = Callable[[str, Any], Verdict]
"""From the content of an answer and the reference of its task."""


def answer(content: str, reference: Any) -> Verdict:
    """`"12"`, `12` or `["Paris", …]`: a number exactly, in whatever form, and a text normalised."""
    if reference is None or isinstance(reference, dict):
        raise TaskFaultError(f"malformed reference: {str(reference)[:40]} is no answer")
    if isinstance(reference, list):
        return text(content, {"answers": reference})
    try:
        number_in(str(reference))
    except ResponseFaultError:
        return text(content, {"answers": [str(reference)]})
    return number(content, {"answer": reference})


def number(content: str, reference: Any) -> Verdict:
    """`{"answer": 7 or "3/4", "absolute_tolerance": 0, "relative_tolerance": 0}`; tolerances are optional."""
    stated = needed(reference, "answer")
    if isinstance(stated, bool) or not isinstance(stated, int | float | str):
        raise TaskFaultError(f"malformed reference: its 'answer' is {stated!r}, not a number or its text")
    try:
        right = number_in(str(stated))
    except ResponseFaultError as error:
        raise TaskFaultError(f"malformed reference: its 'answer': {error}") from error
    absolute, relative = (
        Fraction(str(number_of(reference, f"{name}_tolerance", 0.0))) for name in ("absolute", "relative")
    )
    return number_match(number_in(extraction.final_answer(content)), right, absolute, relative)


def text(content: str, reference: Any) -> Verdict:
    """`{"answers": ["Paris", …]}`: any of them."""
    accepted = needed(reference, "answers")
    if not isinstance(accepted, list) or not all(isinstance(answer, str) for answer in accepted):
        raise TaskFaultError("malformed reference: its 'answers' are no list of texts")
    return text_match(extraction.final_answer(content), accepted)


def choice(content: str, reference: Any) -> Verdict:
    """`{"answer": "B", "choices": "ABCD"}`."""
    right, letters = (str(needed(reference, key)).upper() for key in ("answer", "choices"))
    if len(right) != 1 or right not in letters:
        raise TaskFaultError(f"malformed reference: its 'answer' {right!r} is none of {letters}")
    return choice_match(choice_in(extraction.final_answer(content), letters), right)


def boxes(content: str, reference: Any) -> Verdict:
    """`{"boxes": as in a response, "iou_floor": 0.5}`."""
    expected = extraction.expected(extraction.boxes_in, needed(reference, "boxes"))
    found = extraction.boxes_in(extraction.last_array(content))
    return box_f1(found, expected, number_of(reference, "iou_floor", IOU_FLOOR))


def points(content: str, reference: Any) -> Verdict:
    """`{"points": as in a response, "sigma": 0.02}`."""
    expected = extraction.expected(extraction.points_in, needed(reference, "points"))
    sigma = number_of(reference, "sigma")
    if sigma <= 0:
        raise TaskFaultError(f"malformed reference: its 'sigma' is {sigma}; it has to be above 0")
    return point_f1(extraction.points_in(extraction.last_array(content)), expected, sigma)


def polygons(content: str, reference: Any) -> Verdict:
    """`{"polygons": as in a response}`."""
    expected = extraction.expected(extraction.polygons_in, needed(reference, "polygons"))
    return polygon_iou(extraction.polygons_in(extraction.last_array(content)), expected)


def ocr(content: str, reference: Any) -> Verdict:
    """`{"text": "…"}`: the whole answer is the text."""
    return ocr_similarity(content, str(needed(reference, "text")))


def count(content: str, reference: Any) -> Verdict:
    """`{"count": 7}`."""
    right = number_of(reference, "count")
    if right < 0 or right != int(right):
        raise TaskFaultError(f"malformed reference: its 'count' is {right}, not a whole number of 0 or more")
    return count_closeness(number_in(extraction.final_answer(content)), int(right))


def reasoning_gym(content: str, reference: Any) -> Verdict:
    """`{"dataset": …, "question": …, "answer": …, "metadata": {…}}`: 1 for a full score of its scorer."""
    for key in ("question", "answer", "metadata"):
        needed(reference, key)
    if needed(reference, "dataset") not in logic.DATASETS:
        raise TaskFaultError(f"malformed reference: there is no dataset {reference['dataset']!r}")
    full = logic.score(reference, extraction.final_answer(content)) == logic.FULL
    return scored(float(full), {ACCURACY: float(full)})


def files(content: str, reference: Any) -> Verdict:
    """See `rules/left_files.py`; the content is what `handed_over` makes of files."""
    handed = json.loads(content)
    if not isinstance(handed, dict):
        handed = {"files": {}, "names": []}
    contents = {path: base64.b64decode(each) for path, each in handed["files"].items()}
    return left_files(contents, handed["names"], reference)


def handed_over(files: Mapping[str, bytes], reference: Any) -> str:
    """What the rule `files` needs of the files that a policy has left, as JSON. Raises TaskFaultError for a
    reference that cannot be read, ResponseFaultError for more than is judged."""
    named = {each["path"] for each in expected_files(reference)}
    contents = {path: files[path] for path in sorted(named) if path in files}
    if (size := sum(map(len, contents.values()))) > MAX_FILE_BYTES:
        raise ResponseFaultError(f"huge: {size} bytes of files, more than {MAX_FILE_BYTES}")
    encoded = {path: base64.b64encode(content).decode() for path, content in contents.items()}
    return json.dumps({"files": encoded, "names": sorted(files)})


RULES: Mapping[str, Rule] = {
    rule.__name__: rule
    for rule in (answer, number, text, choice, boxes, points, polygons, ocr, count, reasoning_gym, files)
}
"""Name -> rule. `unit_tests` needs a sandbox and is in `unit_tests.py`."""

PREPARED: Mapping[str, Callable[[], object]] = {"reasoning_gym": logic.prepare}
"""Name of a rule -> what it needs once in a process, and what takes as long as many verdicts."""


def apply_rule(name: str, content: str, reference: Any) -> Verdict:
    """The verdict of a rule, whatever it raises. Raises KeyError for a rule that there is not."""
    rule = RULES[name]
    try:
        return rule(content, reference)
    except ResponseFaultError as error:
        return failed(str(error))
    except TaskFaultError as error:
        return unscored(str(error))
    except Exception as error:
        # A fault of ours; the run goes on and says so.
        return unscored(f"rule raised: {name}: {type(error).__name__}: {error}")
