"""Run tasks of which one raises and one takes its process down, for test_gpu_compile.py.

Run as a program with a folder. Each task that runs leaves its name there, once a run. Prints the
failures as JSON. With a second argument the tasks wait for ever instead, and say that they do.
"""

import json
import os
import sys
import time
from pathlib import Path

from headrace.worker.engine.gpu_compile import Task, run_all


def main() -> None:
    folder, waits = Path(sys.argv[1]), len(sys.argv) > 2

    def task(name: str) -> Task:
        def run() -> None:
            with (folder / name).open("a") as file:
                file.write(f"{os.getpid()}\n")
            if waits:
                print("waiting", flush=True)
                time.sleep(600)  # until it is ended: longer than any test
            if name == "raises":
                raise ValueError("first line\nsecond line")
            if name == "dies":
                os._exit(3)

        return Task(name, run)

    names = ["one", "raises", "dies", "two", "three", "four"]
    print(json.dumps(run_all([task(name) for name in names], 2)))


if __name__ == "__main__":
    main()
