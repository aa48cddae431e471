"""A run with a fault every 50 steps against one that nothing disturbs: the same to the last bit, memory flat.

    python bench/soak.py [--steps 1000] [--every 50] [--minutes 30] [--write FILE]

Two runs of bread.py's embedded example, one thread each, side by side; where a fault ends one, --resume goes
on. Compared, but for seconds, at the newest checkpoint of both: weights, masters, moments, the record, logs.
The other run keeps all checkpoints for that, 5.5 MB each; its memory takes 300 steps to tell. Exit code 1 if
anything is not as it should be. Linux only. 4 x 4 rollouts are 0.15 to 0.45 s a step on one core; with a 50th
of the example's --lr 200 steps search, and 64 of the last 100 have the gradients that a fault could spoil.
"""
import argparse
import itertools
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

BREAD = Path(__file__).resolve().parent.parent / "bread.py"
SETTINGS = "--problems-per-step 4 --group-size 4 --lr 1e-5 --eval-every 1000000".split()
# Exit code, None where nothing ends; lines that are told, on stderr and until --resume goes on.
FAULTS = {"kill -9": (-9, 1), "SIGTERM": (143, 2), "newest checkpoint cut short": (-9, 2),
          "disk full": (1, 2), "stdout closed": (None, 0), "kill -9 in a save": (-9, 1),
          "a bit of its weights flipped": (-9, 2), "second process": (2, 1)}


def start(folder, *flags):
    """bread.py with --output `folder`, from beside it."""
    # Nobody reads the pipes while it runs: 1 MB holds the lines of 10,000 steps.
    return subprocess.Popen([sys.executable, BREAD, "--output", folder.name, *flags], cwd=folder.parent,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, pipesize=2**20,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def last_step(folder):
    path = folder / "metrics.jsonl"
    tail = path.read_bytes()[-8192:] if path.exists() else b""
    return int((re.findall(rb'\{"step": (\d+).*\}\n', tail) or [0])[-1])


def reach(process, folder, step, deadline=float("inf")):
    """Wait for a step, the end of the process or the deadline (time.monotonic()); true if the step came."""
    while last_step(folder) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return last_step(folder) >= step


def steps_of(folder):
    return {int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*[0-9]")}


def provoke(fault, process, folder):
    """One of FAULTS; the process that it ends, None where nothing ends."""
    if fault == "second process":
        return start(folder, *random.choice(([], ["--resume"], ["--overwrite"])))
    if fault == "stdout closed":
        return process.stdout.close()
    if fault == "SIGTERM":
        process.terminate()
    elif fault == "disk full":  # no file may grow beyond a part of a checkpoint, or beyond the largest log
        limit = random.choice((3_000_000, max(path.stat().st_size for path in folder.glob("*.jsonl"))))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))  # which needs no root
    else:
        while "save" in fault and process.poll() is None and not list(folder.glob("checkpoint-*.tmp")):
            time.sleep(0.0005)
        time.sleep(random.uniform(0, 0.02 if "save" in fault else 1))
        process.kill()
        process.wait()
    if "short" in fault or "flipped" in fault:
        path = random.choice(sorted((folder / f"checkpoint-{max(steps_of(folder))}").glob("*tensors")))
        content = bytearray(path.read_bytes())
        place = random.randrange(len(content))
        content[place] ^= 1
        path.write_bytes(content[:place] if "short" in fault else content)
    return process


def disturb(fault, process, folder):
    """(the process that goes on, steps lost, what was told, whether that is as it should be)."""
    ended = provoke(fault, process, folder)
    code = ended.wait() if ended else None
    told = [line.strip() for line in ended.stderr if line.strip()] if ended else []
    lost = 0
    if ended is process:
        lost = last_step(folder)  # before the logs are cut back
        process = start(folder, "--resume")
        for line in process.stdout:  # what is skipped comes first
            told += re.findall("^checkpoint-.*|^continues.*", line)
            if line.startswith("continues"):
                lost -= int(line.split()[-1])
                break
    return process, lost, "; ".join(told), (code, len(told)) == FAULTS[fault]


def watch(process, folder, samples):
    """Note (step, resident bytes, open files) every second while a process runs."""
    status = Path(f"/proc/{process.pid}")
    while process.poll() is None:
        resident = int((status / "statm").read_text().split()[1]) * resource.getpagesize()
        samples.append((last_step(folder), resident, len(os.listdir(status / "fd"))))
        time.sleep(1)


def content_of(folder, step):
    """{name: bytes} of a checkpoint and of the logs until then, without seconds."""
    found = {path.name: path.read_bytes() for path in (folder / f"checkpoint-{step}").iterdir()}
    for path in folder.glob("*.jsonl"):
        lines = path.read_bytes().splitlines()
        found[path.name] = b"\n".join(line for line in lines if int(re.search(rb": (\d+)", line)[1]) <= step)
    # The manifest's own hash covers its seconds; those of the other files stay.
    timed = rb'"(seconds|sha256)[^"]*": (\{[^}]*\}|[^,}]*)'
    return {name: re.sub(timed, b"", content) for name, content in found.items()}


def judge(folder, other, samples):
    """{what was found: whether it is as it should be}."""
    step = max(steps_of(folder) & steps_of(other))
    ours = content_of(folder, step)
    theirs = content_of(other, step)
    different = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
    left = [path.name for path in folder.rglob("*") if path.suffix == ".tmp" or path.name == "crash.txt"]
    verdicts = {f"step {step}: {', '.join(sorted(ours))}; different: {different or 'none'}": not different,
                f"left behind: {left or 'nothing'}": not left}
    last = samples[-1][0]
    first = min(100, last // 2)  # the largest batch has come by then
    for column, unit, most in ((1, "bytes resident", 0.02), (2, "open files", 0)):
        # Medians over a tenth of the run.
        early = statistics.median(row[column] for row in samples if first <= row[0] <= first + last // 10)
        late = statistics.median(row[column] for row in samples if row[0] >= last - last // 10)
        text = f"{late:,.0f} {unit} at the end, {late / early - 1:+.2%} since step {first}"
        verdicts[text] = abs(late / early - 1) <= most
    return verdicts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for flag, default in (("--steps", 1000), ("--every", 50), ("--minutes", 30)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--write", type=Path, default=os.devnull, metavar="FILE")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    folder = Path(tempfile.mkdtemp(prefix="soak-")) / "disturbed"
    other = folder.with_name("undisturbed")
    save_every = max(1, args.every // 5)
    flags = [*SETTINGS, "--steps", f"{args.steps}", "--save-every", f"{save_every}"]
    process = start(folder, *flags)
    undisturbed = start(other, *flags, "--keep", "1000000")
    samples = []
    threading.Thread(target=watch, args=(undisturbed, other, samples), daemon=True).start()

    events = {fault: [] for fault in FAULTS}
    wrong = []
    for due, fault in zip(range(args.every, args.steps, args.every), itertools.cycle(FAULTS)):
        if reach(process, folder, due + random.randrange(save_every), deadline):
            process, lost, told, is_right = disturb(fault, process, folder)
            events[fault].append((lost, told))
            wrong += [] if is_right else [f"step {due}, {fault}: {told}"]
    if not reach(process, folder, args.steps, deadline):
        process.terminate()
    code = process.wait()
    reach(undisturbed, other, last_step(folder))
    undisturbed.terminate()
    undisturbed.wait()

    verdicts = {f"answered in another way: {wrong or 'no fault'}": not wrong,
                f"exit code {code}": code in (0, 143), **judge(folder, other, samples)}
    lines = ["| fault | times | steps lost | told the last time |", "|---|---|---|---|"]
    for fault, its in events.items():
        lost = ", ".join(f"{steps}" for steps, _ in its)
        lines.append(f"| {fault} | {len(its)} | {lost} | {its[-1][1] if its else ''} |")
    lines += ["", *(f"- {'ok' if is_so else 'WRONG'}: {text}" for text, is_so in verdicts.items())]
    print("\n".join(lines))
    args.write.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if all(verdicts.values()):
        shutil.rmtree(folder.parent)
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
