"""The rounds of the README in one command: drive, fine-tune on the episodes, take the new policy.

    python rounds.py ~/ray_results/robot-loop --rounds 5

Give it again after a power cut: it goes on with what is on the disk.
"""

import argparse
import subprocess
import sys


def run(*command):
    """Runs a command, and ends with it if it fails."""
    status = subprocess.run([str(word) for word in command]).returncode
    if status:
        sys.exit(status)


def main():
    """Drives and fine-tunes, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of the pre-training")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--greedy", type=int, default=30, help="drives that judge each policy")
    options = parser.parse_args()
    loop = (sys.executable, "control_loop.py")
    run(*loop, "--greedy", options.greedy)
    for _ in range(options.rounds):
        run(*loop)
        run("rllib", "fine-tune", options.checkpoint, "--episodes", "episodes", "--export", "policy.npz")
        run(*loop, "--greedy", options.greedy)


if __name__ == "__main__":
    main()
