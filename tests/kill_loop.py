"""Kill a small run with SIGKILL at random moments, again and again; compare it with one never killed.

    python tests/kill_loop.py                        20 kills, about three minutes
    python tests/kill_loop.py --kills=100 --seed=7   100 kills, other random moments

pytest does not run it: tests/training/test_stopped.py kills a run at every file that it writes, which is
quicker and less honest.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import torch

TRAIN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")
STEPS = 3000
SETTINGS = ["--dataset=addition", "--device=cpu", f"--max_steps={STEPS}", "--eval_interval=20",
            "--eval_batches=1", "--eval_batch_size=50", "--batch_size=16", "--n_embd=16", "--dropout=0.1"]


def train(*arguments, seconds=None):
    """Run train.py to its end, or kill it after some seconds. True if it came to its end."""
    process = subprocess.Popen([sys.executable, TRAIN, *SETTINGS, *arguments], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False
    if process.returncode not in (0, 2):  # 2: it came to its end and missed its target
        sys.exit(f"the run failed:\n{errors.decode()}")
    return True


def kill_again_and_again(kills, seed):
    """Kill a run `kills` times at random moments; exit with a message if it ends unlike one never killed."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        train("--out_dir=out/dense", "--max_steps=400")
        gated = ["--gated=True", "--init_from=out/dense", "--linear_penalty_steps=1000"]
        began = time.time()
        train(*gated, "--out_dir=out/whole")
        whole = time.time() - began
        killed = 0
        while killed < kills:
            patience = draw.uniform(0.5, 1.0) * max(4.0, whole / 4)  # seconds
            ended = train(*gated, "--out_dir=out/killed", seconds=patience)
            saved, step = "out/killed/last.pt", 0
            if os.path.exists(saved):
                step = torch.load(saved, weights_only=True)["step"]
            if not ended:
                killed += 1
                print(f"kill {killed}: at step {step or 'none saved yet'}", flush=True)
            if step == STEPS:  # killed in the report, if at all
                print(f"it came to its end after {killed} kills; that counts as one round, the next begins")
                compare("out/whole", "out/killed")
                os.rename("out/killed", f"out/killed-{killed}")
        train(*gated, "--out_dir=out/killed")
        compare("out/whole", "out/killed")


def compare(a, b):
    """Exit with a message if the final parameters of two runs differ."""
    a, b = (torch.load(f"{name}/last.pt", weights_only=True)["model"] for name in (a, b))
    if not all(torch.equal(a[name], b[name]) for name in a):
        sys.exit("FAILED: the final parameters differ")
    print("the final parameters are bit for bit those of the run that was never killed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of the random moments")
    options = parser.parse_args()
    kill_again_and_again(options.kills, options.seed)
