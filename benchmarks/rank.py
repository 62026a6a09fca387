"""One rank of one contender: builds it, then sleeps until told to run exactly one step.

Started by team.py: a line in for each step, a line of JSON out; ``step`` for the step alone, any other word for a step
under that observation. Whatever the contender prints goes to stderr, which the
parent keeps in a log. The end of stdin is the order to leave, so no rank outlives its parent.
"""

import json
import os
import resource
import sys


def main() -> None:
    """Obey the parent until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    order = json.loads(sys.argv[1])
    import torch
    from contenders import CONTENDERS
    from workload import Job

    torch.set_num_threads(order["threads"])
    contender = CONTENDERS[order["contender"]](Job(**order["job"]), order["layout"])
    contender.setup(order["rank"], order["world_size"], order["port"])
    replies.write(reply(None))
    for word in map(str.strip, sys.stdin):
        replies.write(reply(contender.step()) if word == "step" else reply(None, contender.observe(word)))
    contender.teardown()


def reply(loss: float | None, observed: object = None) -> str:
    """What the parent reads after a step: the loss, CPU seconds since the start, the most memory held, in MiB."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = usage.ru_utime + usage.ru_stime
    memory_mib = usage.ru_maxrss / 1024
    facts = {"loss": loss, "cpu_seconds": cpu_seconds, "memory_mib": memory_mib, "observed": observed}
    return json.dumps(facts) + "\n"


if __name__ == "__main__":
    main()
