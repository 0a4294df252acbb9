"""Run a command and write its wall time and peak memory: `python run_one.py REPORT COMMAND ...`.

A process of its own, and a small one: the system counts into a new process's peak the memory of the one that starts it.
"""

import json
import os
import sys
import time


def main() -> None:
    """Run the command and exit as it does; what it says goes where this process's own words go."""
    report, command = sys.argv[1], sys.argv[2:]
    start = time.perf_counter()
    process = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, kilobytes elsewhere
    with open(report, "w", encoding="utf-8") as file:
        json.dump({"seconds": seconds, "peak_mb": usage.ru_maxrss * unit / 2**20}, file)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
