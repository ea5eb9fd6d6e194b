"""Run a command on GPUs that no other step of this machine holds: python on_free_gpus.py COUNT COMMAND [ARGUMENT ...]"""
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def usable():
    "The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none on a machine without."
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return asked.stdout.split() if asked.returncode == 0 else []


def hold(gpus, count, folder):
    "dict GPU -> its locked file, for `count` of these, or None while too few are free."
    with contextlib.ExitStack() as taken:
        held = {}
        for gpu in gpus:
            file = taken.enter_context(open(folder / f"{gpu}.lock", "w"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held[gpu] = file
            if len(held) == count:
                taken.pop_all()
                return held


def main(count, *command):
    "Become the command; the system frees the GPUs when it ends, however it ends."
    count, gpus = int(count), usable()
    if gpus and count > len(gpus):
        sys.exit(f"this step takes {count} GPUs and {len(gpus)} are to be had ({', '.join(gpus)}): set parallel_processes to at most {len(gpus)}")
    if gpus:  # without any, a small model may run on the CPU
        folder = Path(tempfile.gettempdir()) / f"catto-gpus-{os.getuid()}"
        folder.mkdir(exist_ok=True)
        while (held := hold(gpus, count, folder)) is None:
            time.sleep(1)
        for file in held.values():
            os.set_inheritable(file.fileno(), True)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(held)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
