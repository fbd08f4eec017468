"""Programs without the seconds of their imports: this process has them, and forks for each.

A line of JSON in, a list for each rank: arguments, environment, files of stdout and stderr. Two
lines out: the processes' numbers at once, and in the end their statuses.
"""

import gc
import json
import os
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib.pyplot  # noqa: E402, F401
import transformers.models.qwen2.modeling_qwen2  # noqa: E402, F401

import eval  # noqa: E402, F401
from machinery import page  # noqa: E402, F401

SECONDS = 280


def become(args: list[str], env: dict[str, str], out: str, err: str) -> None:
    os.setsid()
    signal.alarm(SECONDS)
    for fd, file in enumerate((os.devnull, out, err)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), fd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = args[args[0] == "-m" :]
    start = runpy.run_module if args[0] == "-m" else runpy.run_path
    start(sys.argv[0], run_name="__main__")


def fork(job: list) -> int:
    if pid := os.fork():
        return pid
    status = 1
    try:
        become(*job)
        status = 0
    except BaseException:  # of a program that does not `launch`
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    gc.freeze()
    for line in sys.stdin:
        pids = [fork(job) for job in json.loads(line)]
        print(json.dumps(pids), flush=True)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        print(json.dumps([os.waitstatus_to_exitcode(status) for status in statuses]), flush=True)
