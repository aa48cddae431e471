"""Claims about parallel.py: several processes do what one does, and no death of one costs what was saved.

Processes are real: started by torchrun on this machine, joined over gloo, on the CPU. They train the embedded
example (its last cuts give real successes) at a small learning rate: sums in another order differ in their last bits,
which AdamW may turn into a share of --lr.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import bread
from model import Transformer
from parallel import Ranks

ROOT = Path(bread.__file__).resolve().parent
CHAIN = ROOT / "examples" / "chain"
LR = 1e-5


pytestmark = pytest.mark.usefixtures("one_thread")  # as the processes have it: OMP_NUM_THREADS=1


# ---------------------------------------------------------------- processes


def torchrun(num, script, *argv):
    """(exit code, stdout, stderr) of `torchrun --nproc-per-node NUM script argv`, all on the loopback interface.

    The agent chooses a free port itself (--standalone). If it hangs it is told to end its processes, too.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
               "--nproc-per-node", f"{num}", f"{script}", *argv]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}"}
    if sys.platform == "linux":  # whatever this machine's name resolves to
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    process = subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    try:
        out, err = process.communicate(timeout=200)
        return process.returncode, out, err
    finally:
        process.terminate()
        process.wait()


def alone(*argv):
    """Exit code of the same program in this one process."""
    return bread.main(list(argv))


# As bread.py, but process 1 gets a signal in the middle of a step, and saving takes two seconds. Every process notes
# its exit code and which checkpoints there are by then, and lets the other do so, too, before it exits.
BREAK = """
import os, pathlib, sys, time
import bread

where, number, step = pathlib.Path(sys.argv.pop(1)), int(sys.argv.pop(1)), int(sys.argv.pop(1))
update, save = bread.update, bread.checkpoint.RunFolder.save

def broken_update(run, groups):
    if run.ranks.rank == 1 and run.step == step - 1:
        os.kill(os.getpid(), number)
    update(run, groups)

def slow_save(*args, **keywords):
    time.sleep(2)
    return save(*args, **keywords)

bread.update, bread.checkpoint.RunFolder.save = broken_update, slow_save
code = bread.main()
saved = sorted(path.name for path in (where / "run").glob("checkpoint-*"))
(where / f"code-{os.environ['RANK']}").write_text(f"{code} {' '.join(saved)}")
until = time.monotonic() + 30
while len(list(where.glob("code-*"))) < 2 and time.monotonic() < until:
    time.sleep(0.05)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "heldout.jsonl"
    path.write_text("".join((CHAIN / "heldout.jsonl").read_text().splitlines(keepends=True)[:3]))
    return path


@pytest.fixture(scope="module")
def flags(heldout):
    """flags(output, ...): four steps of three problems, two of which belong to one of two processes; every failed
    problem without an anchor gets its expert's trace, so that every step has a gradient."""
    def make(output, *more):
        return ["--model", f"{CHAIN / 'model'}", "--data", f"{CHAIN / 'train.jsonl'}", "--eval-data", f"{heldout}",
                "--output", f"{output}", "--device", "cpu", "--steps", "4", "--save-every", "2", "--eval-every", "2",
                "--problems-per-step", "3", "--max-new-tokens", "72", "--on-fail", "expert", "--lr", f"{LR}",
                "--updates-per-batch", "2", "--micro-batch-size", "5", "--weight-decay", "0.1", *more]
    return make


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of the run by one process, not interrupted; it holds checkpoint-2 and checkpoint-4."""
    path = tmp_path_factory.mktemp("whole")
    assert alone(*flags(path)) == 0
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def until_step_2(folder, copy):
    """A copy of a run's folder as it was when step 2 had been saved."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoint-4")
    return copy


def assert_same_run(folder, whole):
    """Logs: tokens, counts and evaluations equal, other numbers to float32 rounding. Checkpoint: the same files, names
    and shapes; weights and masters within 1e-6, a tenth of what one update moves them by; moments to 1e-3 of the
    largest of their tensor."""
    for ours, theirs in zip(*(read_lines(path / "samples.jsonl") for path in (folder, whole)), strict=True):
        if theirs["entropy"] is not None:  # of an expert's trace
            theirs["entropy"] = pytest.approx(theirs["entropy"], abs=1e-5)
        assert ours == theirs
    for ours, theirs in zip(*(read_lines(path / "metrics.jsonl") for path in (folder, whole)), strict=True):
        assert ours.keys() == theirs.keys()
        for name in (name for name in theirs if not name.startswith("seconds/")):
            is_count = name.split("/")[0] in ("step", "tokens", "anchor", "eval", "reward", "skipped_updates")
            if not is_count and theirs[name] is not None:
                theirs[name] = pytest.approx(theirs[name], rel=1e-5, abs=1e-6)
            assert ours[name] == theirs[name], name
    ours, theirs = folder / "checkpoint-4", whole / "checkpoint-4"
    assert {path.name: path.stat().st_size for path in ours.iterdir() if path.name != "trainer.json"} == {
        path.name: path.stat().st_size for path in theirs.iterdir() if path.name != "trainer.json"}
    for name in ("model.safetensors", "trainer.tensors"):
        found, expected = load_file(ours / name), load_file(theirs / name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            is_moment = key.split(".")[-1] in ("exp_avg", "exp_avg_sq")
            atol = 1e-3 * tensor.abs().max().item() if is_moment else 1e-6
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=atol, msg=lambda text: f"{key}: {text}")


# ---------------------------------------------------------------- one process


def test_one_process_joins_nobody_and_changes_nothing():
    """Every method gives back what it was given, the very object where it is a tensor or a list to keep."""
    ranks, tensor, items = Ranks(torch.device("cpu")), torch.ones(3), [1, 2, 3]
    assert (ranks.rank, ranks.size, ranks.device) == (0, 1, torch.device("cpu")) and not dist.is_initialized()
    assert ranks.share(items) == items and ranks.gather(items) is items and ranks.from_first(items) is items
    assert ranks.sum(number for number in (1, 2.5)) == [1, 2.5]
    assert ranks.reduce(tensor, 0) is tensor and ranks.broadcast(tensor, 0) is None and (tensor == 1).all()
    assert ranks.owners([5, 1, 2]) == [0, 0, 0] and ranks.collect(state := {"a": tensor}) is state
    ranks.leave()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_owners_balance_the_optimizer_state(size):
    """Every parameter of a model has one owner, the same on every process; no load exceeds another by more than the
    smallest parameter that its owner holds, whatever the order."""
    ranks = Ranks(torch.device("cpu"))
    ranks.size = size
    layer = [896 * 896, 896, 896 * 128, 128, 896 * 128, 128, 896 * 896, 896 * 4864, 896 * 4864, 4864 * 896, 896, 896]
    for sizes in ([151936 * 896, *layer * 24, 896], [*layer * 3, 7], [5] * 16, list(range(1, 40))):
        owners = ranks.owners(sizes)
        assert owners == ranks.owners(sizes) and len(owners) == len(sizes) and set(owners) == set(range(size))
        loads = [sum(x for x, owner in zip(sizes, owners) if owner == rank) for rank in range(size)]
        for rank in range(size):
            held = [x for x, owner in zip(sizes, owners) if owner == rank]
            assert loads[rank] - min(loads) <= min(held)


# ---------------------------------------------------------------- several processes


METHODS = """
import torch
from parallel import Ranks

ranks = Ranks(torch.device("cpu"))
rank, size = ranks.rank, ranks.size
assert size == 3
for length in range(8):
    items = [{"problem": i} for i in range(length)]
    mine = ranks.share(items)
    assert mine == items[rank::3] and ranks.gather(mine) == items
assert ranks.sum([rank, 2**53 - 3 + rank, 0.5]) == [3.0, 3.0 * 2**53 - 6, 1.5]
assert ranks.from_first({"rank": rank}) == {"rank": 0}
for owner in range(3):
    total = ranks.reduce(torch.full((2, 2), float(rank + 1)), owner)
    assert rank != owner or (total == 6).all()
    value = torch.full((3,), float(rank))
    ranks.broadcast(value, owner)
    assert (value == owner).all()
everything = {f"{i}.{name}": torch.full(shape, float(i)) for i in range(5) for name, shape in
              (("master", (i, 2)), ("step", ()), ("moment", (2, i)))}
everything["1.master"] = torch.nn.Parameter(torch.ones(3, 4)[:, ::2])
everything["2.moment"] = torch.arange(4).bfloat16()
whole = ranks.collect({name: x for name, x in everything.items() if int(name[0]) % 3 == rank})
assert rank or whole.keys() == everything.keys()
assert not rank or whole == {}
for name, x in whole.items():
    assert torch.equal(x, everything[name]) and x.dtype == everything[name].dtype
ranks.leave()
open(f"{rank}.done", "w").close()
"""


def test_three_processes_share_gather_sum_and_collect(tmp_path):
    """Lists of 0 to 7 items come back in order; sums are exact beyond 2^53 parts; a parameter's owner gets its sum,
    everybody its value; rank 0 gets every tensor, empty, scalar, strided and bf16 ones included, and others none."""
    (tmp_path / "methods.py").write_text(METHODS)
    (tmp_path / "go.py").write_text(f"import os; os.chdir({f'{tmp_path}'!r}); exec(open('methods.py').read())")
    code, _, err = torchrun(3, tmp_path / "go.py")
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.glob("*.done")) == ["0.done", "1.done", "2.done"]


@pytest.fixture(scope="module")
def shared(flags, tmp_path_factory):
    """(folder, stdout) of the same run by two processes."""
    path = tmp_path_factory.mktemp("shared")
    code, out, err = torchrun(2, ROOT / "bread.py", *flags(path))
    assert code == 0, err
    return path, out


def test_two_processes_do_what_one_does(whole, shared):
    """Same tokens sampled, same anchors searched and found, same metrics, and a checkpoint that differs by rounding.
    Only one of them speaks, and the comparison means something: anchors were accepted, weights have moved."""
    folder, out = shared
    assert_same_run(folder, whole)
    assert out.count("step 4/4") == 1 and out.count("method   bread") == 1
    assert sum(row.get("anchor/accepted", 0) for row in read_lines(whole / "metrics.jsonl")) >= 2
    start = load_file(CHAIN / "model" / "model.safetensors")
    final = load_file(whole / "checkpoint-4" / "model.safetensors")
    moved = max((final[name].float() - start[name].float()).abs().max().item() for name in start)
    assert moved > 3 * LR


def test_one_process_resumes_what_two_have_saved(flags, whole, shared, tmp_path):
    """Step 2 of the run by two, continued by one, ends where the run by one ended."""
    folder = until_step_2(shared[0], tmp_path / "run")
    assert alone(*flags(folder, "--resume")) == 0
    assert_same_run(folder, whole)


def test_two_processes_resume_what_one_has_saved(flags, whole, tmp_path):
    """And the other way round; each process finds its own part of the optimizer's state."""
    folder = until_step_2(whole, tmp_path / "run")
    code, _, err = torchrun(2, ROOT / "bread.py", *flags(folder, "--resume"))
    assert code == 0, err
    assert_same_run(folder, whole)


def broken(flags, tmp_path, number, step):
    """(folder of the run, {rank: its note}) after process 1 of two got a signal in the middle of a step."""
    (tmp_path / "broken.py").write_text(BREAK)
    code, _, err = torchrun(2, tmp_path / "broken.py", f"{tmp_path}", f"{int(number)}", f"{step}",
                            *flags(tmp_path / "run"))
    assert code != 0 and "bread.py: " not in err, err
    return tmp_path / "run", {path.name[-1]: path.read_text() for path in tmp_path.glob("code-*")}


def test_a_killed_process_ends_the_run_and_what_was_saved_stays(flags, whole, tmp_path):
    """SIGKILL to one of two in step 3: torchrun fails, the checkpoint of step 2 loads, and a resumed run ends where
    the unbroken one ended."""
    folder, notes = broken(flags, tmp_path, signal.SIGKILL, step=3)
    assert notes == {}, "neither got to the end"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    Transformer.from_pretrained(folder / "checkpoint-2")
    assert alone(*flags(folder, "--resume")) == 0
    assert_same_run(folder, whole)


def test_an_interrupt_of_one_process_ends_all_after_the_step_with_everything_saved(flags, whole, tmp_path):
    """SIGINT to one of two in step 3: both finish the step and exit with 130. The one that does not save waits for
    the one that does, which torchrun would otherwise tell to end, and kill half a minute later. The run resumes."""
    folder, notes = broken(flags, tmp_path, signal.SIGINT, step=3)
    assert notes == dict.fromkeys("01", "130 checkpoint-2 checkpoint-3")
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    assert alone(*flags(folder, "--resume")) == 0
    assert_same_run(folder, whole)


# ---------------------------------------------------------------- more processes than problems, and other options


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ["--kl", "0.05", "--importance-cap", "1.5", "--loss-mean", "sequence", "--recompute", "--on-fail", "resample"],
    ["--method", "grpo", "--no-std", "--sample-batch-size", "5", "--warmup-steps", "3"],
    ["--method", "sft", "--lr-decay", "0.5"],
    ["--anchor", "random", "--anchor-placement", "hint", "--temperature", "0.8"]], ids=lambda options: options[1])
def test_three_processes_with_two_problems_do_what_one_does(flags, tmp_path, options):
    """One process has nothing to sample and nothing to train on in any step, but its part of the optimizer's state and
    one of three held-out problems: the same run as by one process, whatever the options."""
    more = ["--problems-per-step", "2", *options]
    assert alone(*flags(tmp_path / "one", *more)) == 0
    code, _, err = torchrun(3, ROOT / "bread.py", *flags(tmp_path / "three", *more))
    assert code == 0, err
    assert_same_run(tmp_path / "three", tmp_path / "one")
    assert all(row["grad_norm"] > 0 for row in read_lines(tmp_path / "one" / "metrics.jsonl") if row["step"])


@pytest.mark.slow
def test_two_processes_evaluate_and_refuse_as_one_does(flags, heldout, tmp_path, capsys):
    """--eval prints one line, the same as by one process, and leaves no folder. Bad input of which only the process
    that writes knows, a folder with a run in it, ends all of them, and not after an hour."""
    command = ["--model", f"{CHAIN / 'model'}", "--eval", "--eval-data", f"{heldout}", "--max-new-tokens", "72",
               "--eval-samples", "4", "--device", "cpu", "--output", f"{tmp_path / 'eval'}"]
    assert alone(*command) == 0
    expected = capsys.readouterr().out.splitlines()[-1]
    code, out, err = torchrun(2, ROOT / "bread.py", *command)
    assert code == 0, err
    assert "greedy" in expected and out.splitlines()[-1] == expected and out.count("greedy") == 1
    assert not (tmp_path / "eval").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    for more in ([], ["--resume"]):
        code, _, err = torchrun(2, ROOT / "bread.py", *flags(tmp_path / "run", *more))
        assert code != 0 and err.count("bread.py: ") == 1 and "--overwrite" in err
