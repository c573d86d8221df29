"""A process that applies rules: a request a line in, a verdict a line out, both JSON.

    python -m k25_train.rl.rewards.worker

    {"rule": "boxes", "content": "…", "reference": {…}, "deadline_s": 2.0}
    {"status": "scored", "reward": 0.5, "parts": {…}, "reason": ""}

    {"prepare": "reasoning_gym"}          once, for a rule that needs it; without an alarm
    ready

The alarm ends the process, whatever it is in the middle of, and whether or not whoever asked still lives.
"""

import json
import resource
import signal
import sys

from k25_train.rl.rewards.text_rules import PREPARED, apply_rule

MEMORY_BYTES = 2 << 30
"""Address space of a worker. Source: our choice; numpy and the largest ordinary request take a tenth."""

READY = "ready"
"""First line of a worker: starting counts towards no deadline."""


def main() -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    print(READY, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            PREPARED[request["prepare"]]()
            print(READY, flush=True)
            continue
        signal.setitimer(signal.ITIMER_REAL, request["deadline_s"])
        verdict = apply_rule(request["rule"], request["content"], request["reference"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict.as_json(), allow_nan=False), flush=True)


if __name__ == "__main__":
    main()
