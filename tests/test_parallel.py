"""Claims about parallel.py: master weights, and several processes that do what one does and lose nothing when
one dies.

Processes are real: started by torchrun on this machine, joined over gloo, on the CPU. They train the
embedded example at a small learning rate: sums in another order differ in their last bits, which AdamW may
turn into a share of --lr.
"""
import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import bread
from conftest import CHAIN, ROOT, read_lines
from model import Transformer
from parallel import MasterAdamW, Ranks

LR = 1e-5
pytestmark = pytest.mark.usefixtures("one_thread")  # as the processes have it: OMP_NUM_THREADS=1


# ---------------------------------------------------------------- one process


class Late(Ranks):
    """Gets a signal while the processes agree on whether there was one."""

    def gather(self, mine):
        self.signal = signal.SIGINT
        return [mine]


def test_one_process_joins_nobody_and_loses_no_signal():
    """Every method gives back what it was given. A signal that comes when all have said that there was
    none ends the run after the next step; the second one of its kind is the system's again."""
    ranks = Ranks("cpu")
    items = [1, 2, 3]
    assert (ranks.rank, ranks.size, ranks.device) == (0, 1, torch.device("cpu"))
    assert ranks.share(items) == items and ranks.gather(items) == [items] and ranks.from_first(items) is items
    counts = {"a": 1, "b": 2.5}
    assert ranks.total(counts) == ranks.collect(counts) == counts
    late = Late("cpu")
    assert [late.interrupted(), late.interrupted(), late.signal] == [False, True, signal.SIGINT]
    before = signal.getsignal(signal.SIGTERM)
    ranks.listen()
    assert not ranks.interrupted()
    os.kill(os.getpid(), signal.SIGTERM)
    assert ranks.interrupted() and ranks.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ranks.leave()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_owners_balance_the_optimizer_state(size):
    """Every parameter of a model has one owner, the same on every process; no load exceeds another by more
    than the smallest parameter that its owner holds, whatever the order."""
    ranks = Ranks("cpu")
    ranks.size = size
    D, I = 896, 4864
    layer = [D * D, D, D * 128, 128, D * 128, 128, D * D, D * I, D * I, I * D, D, D]
    for sizes in ([151936 * 896, *layer * 24, 896], [*layer * 3, 7], [5] * 16, list(range(1, 40))):
        owners = ranks.owners(sizes)
        assert owners == ranks.owners(sizes) and len(owners) == len(sizes) and set(owners) == set(range(size))
        held = [[x for x, owner in zip(sizes, owners) if owner == rank] for rank in range(size)]
        assert all(sum(mine) - min(map(sum, held)) <= min(mine) for mine in held)


def step(optimizer, number, lr=1e-6):
    """One step with gradients drawn by number; returns their norm."""
    generator = torch.Generator().manual_seed(number)
    for weight in optimizer.weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return optimizer.step(lr, max_norm=1e-3)


def test_float32_masters_add_up_what_bf16_weights_would_lose():
    """AdamW moves a weight by about lr = 1e-6 a step. A bf16 weight of 0.1 has neighbours 5e-4 away, so a
    single step leaves it where it is; 600 steps must not. Masters are float32, weights their rounding."""
    weight = torch.nn.Parameter(torch.full((8,), 0.1, dtype=torch.bfloat16))
    start = weight.detach().clone()
    optimizer = MasterAdamW([weight], Ranks("cpu"))
    for number in range(600):
        weight.grad = torch.ones_like(weight)
        optimizer.step(1e-6, max_norm=1.0)
        if number == 0:
            assert torch.equal(weight, start) and (optimizer.masters[0] < start.float()).all()
    master = optimizer.masters[0]
    assert master.dtype == torch.float32 and torch.equal(weight, master.bfloat16()) and (weight < start).all()
    torch.testing.assert_close(master, start.float() - 600e-6, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizers_state_survives_a_round_trip(dtype):
    """A second optimizer that restores it steps on bit for bit, weights and moments; float32 weights are
    their own masters. Another model's state is refused. The norm is that before clipping, moments get the
    clipped gradient, and a parameter without a gradient counts as 0."""
    def make(*shapes):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
        return MasterAdamW(weights, Ranks("cpu"), weight_decay=0.1)
    first, second = make((3, 4), (5,)), make((3, 4), (5,))
    norm = step(first, 1, lr=1e-2)
    moments = torch.cat([first.state()[f"{i}.exp_avg"].flatten() for i in (0, 1)])
    assert norm > 1 and moments.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)  # (1 - beta_1) clip
    second.restore(copy.deepcopy(first.state()))
    with torch.no_grad():
        second.hand_out()
    for optimizer in (first, second):
        assert step(optimizer, 2, lr=1e-2) > 1 and all(weight.grad is None for weight in optimizer.weights)
    ours, theirs = first.state(), second.state()
    assert ours.keys() == theirs.keys() == {f"{i}.{name}" for i in (0, 1) for name in
                                            ("master", "exp_avg", "exp_avg_sq", "step")}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(a, b) for a, b in zip(first.weights, second.weights))
    assert (first.masters[0] is first.weights[0]) == (dtype == torch.float32)
    for others in (make((3, 5), (5,)), make((3, 4), (5,), (2,))):
        with pytest.raises(ValueError, match="other shapes"):
            others.restore(ours)
    assert first.step(1e-2, max_norm=1.0) == 0


# ---------------------------------------------------------------- several processes


def torchrun(num, script, *argv):
    """(exit code, stdout, stderr) of `torchrun --nproc-per-node NUM script argv`, all on the loopback
    interface.

    The agent chooses a free port itself (--standalone). If it hangs it is told to end its processes, too.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
               "--nproc-per-node", f"{num}", f"{script}", *argv]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}"}
    if sys.platform == "linux":  # whatever this machine's name resolves to
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    process = subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=200)
        return process.returncode, out, err
    finally:
        process.terminate()
        process.wait()


THREE = """
import pathlib, torch, torch.distributed as dist
from parallel import MasterAdamW, Ranks

ranks = Ranks("cpu")
rank = ranks.rank
for length in range(8):
    mine = ranks.share(list(range(length)))
    assert mine == list(range(length))[rank::3]
    assert sum(ranks.gather(mine), []) == [i for r in range(3) for i in range(length)[r::3]]
assert ranks.total({"all": 2**53 - 3 + rank, f"{rank}": 0.5}) == {
    "all": 3 * 2**53 - 6, "0": 0.5, "1": 0.5, "2": 0.5}
assert ranks.from_first({"rank": rank}) == {"rank": 0}
everything = {f"{i}.{name}": torch.full(shape, float(i)) for i in range(5) for name, shape in
              (("master", (i, 2)), ("step", ()), ("moment", (2, i)))}
everything["1.master"] = torch.nn.Parameter(torch.ones(3, 4)[:, ::2])
everything["2.moment"] = torch.arange(4).bfloat16()
whole = ranks.collect({name: x for name, x in everything.items() if int(name[0]) % 3 == rank})
assert whole.keys() == (everything.keys() if rank == 0 else set())
for name, x in whole.items():
    assert torch.equal(x, everything[name]) and x.dtype == everything[name].dtype

weights = [torch.nn.Parameter(torch.full((size,), 1.0, dtype=torch.bfloat16)) for size in (4, 9, 5, 2)]
optimizer = MasterAdamW(weights, ranks)
assert len(optimizer.masters) in (1, 2)
for loss, expected in ((0.0, 20**0.5 * (0 + 1 + 2)), (float("nan") if rank == 1 else 0.0, None)):
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.full_like(weight, float(rank)) if len(weight) != 2 or rank else None
    norm = optimizer.step(0.25, 1.0, loss)
    assert norm is expected is None or abs(norm - expected) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(before, weights)) == (expected is None)
    for weight in weights:
        theirs = ranks.gather(weight.detach())
        assert all(torch.equal(weight, other) for other in theirs)
assert len(optimizer.state()) == (16 if rank == 0 else 0)
ranks.leave()
pathlib.Path(__file__).with_name(f"{rank}.done").touch()
"""


def test_three_processes_share_sum_collect_and_step(tmp_path):
    """Lists of 0 to 7 items are dealt and come back; sums are exact beyond 2^53; rank 0 gets every tensor,
    empty, scalar, strided and bf16 ones included, others none. An optimizer step sums the gradients of
    all, a missing one counting as 0, and hands every new weight to everybody; where one has a NaN nobody
    steps."""
    (tmp_path / "three.py").write_text(THREE)
    code, _, err = torchrun(3, tmp_path / "three.py")
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.glob("*.done")) == ["0.done", "1.done", "2.done"]


@pytest.fixture(scope="module")
def flags(data):
    """flags(output, ...): four steps of three problems, two of which belong to one of two processes; every
    failed problem without an anchor gets its expert's trace, so that every step has a gradient."""
    def make(output, *more):
        return ["--model", f"{CHAIN / 'model'}", "--data", f"{data / 'train.jsonl'}", "--eval-data",
                f"{data / 'heldout.jsonl'}", "--output", f"{output}", "--device", "cpu", "--steps", "4",
                "--save-every", "2", "--eval-every", "2", "--problems-per-step", "3", "--max-new-tokens",
                "72", "--on-fail", "expert", "--lr", f"{LR}", "--updates-per-batch", "2",
                "--micro-batch-size", "5", "--weight-decay", "0.1", *more]
    return make


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of the run by one process, not interrupted; it holds checkpoint-2 and checkpoint-4."""
    path = tmp_path_factory.mktemp("whole")
    assert bread.main(flags(path)) == 0
    return path


def assert_same_run(folder, whole):
    """Logs: tokens, counts, probes and evaluations equal, other numbers to float32 rounding; of samples,
    the first of a step, for the process that writes has none of the other's rollouts. Checkpoint: names
    and shapes; weights and masters within 1e-6, a tenth of what one update moves them by; moments to 1e-3
    of the largest of their tensor."""
    probes, samples, metrics = ([read_lines(path / f"{name}.jsonl") for path in (folder, whole)]
                                for name in ("probes", "samples", "metrics"))
    assert sorted(map(str, probes[0])) == sorted(map(str, probes[1]))
    firsts = [list({row["step"]: row for row in reversed(rows)}.values()) for rows in samples]
    for ours, theirs in [*zip(*firsts, strict=True), *zip(*metrics, strict=True)]:
        assert ours.keys() == theirs.keys()
        for name in (name for name in theirs if not name.startswith("seconds/")):
            is_count = name.split("/")[0] in ("step", "tokens", "anchor", "eval", "reward", "skipped_updates")
            if not is_count and isinstance(theirs[name], float):
                theirs[name] = pytest.approx(theirs[name], rel=1e-5, abs=1e-5 if name == "entropy" else 1e-6)
            assert ours[name] == theirs[name], name
    for name in ("model.safetensors", "trainer.tensors"):
        found, expected = (load_file(path / "checkpoint-4" / name) for path in (folder, whole))
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            is_moment = key.split(".")[-1] in ("exp_avg", "exp_avg_sq")
            atol = 1e-3 * tensor.abs().max().item() if is_moment else 1e-6
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=atol)


# As bread.py, but each process notes its exit code, which checkpoints there are by then and the largest
# object that it sent to others, and lets the other do so, too, before it exits.
NOTING = """
import os, pathlib, pickle, sys, time
import torch.distributed as dist
import bread

where = pathlib.Path(sys.argv.pop(1))
sizes = []
gather = dist.all_gather_object

def all_gather_object(parts, mine):
    sizes.append(len(pickle.dumps(mine)))
    gather(parts, mine)

dist.all_gather_object = all_gather_object
code = bread.main()
saved = sorted(path.name for path in (where / "run").glob("checkpoint-*"))
(where / f"size-{os.environ['RANK']}").write_text(f"{max(sizes)}")
(where / f"code-{os.environ['RANK']}").write_text(f"{code} {' '.join(saved)}")
until = time.monotonic() + 30
while len(list(where.glob("code-*"))) < 2 and time.monotonic() < until:
    time.sleep(0.05)
sys.exit(code)
"""
# A method that sends process 1 a signal in step 3; then every fsync takes long, and saving with it.
BREAKING = """
import os, time
import bread

def method(policy, problems, state):
    if state.step == 2:
        if int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), {number})
        flush = os.fsync
        os.fsync = lambda descriptor: (time.sleep(0.2), flush(descriptor))
    return bread.bread(policy, problems, state)
"""


def noting(where, *argv):
    """(exit code, stderr, stdout, {rank: its note}) of two processes that run NOTING in the folder
    `where`."""
    (where / "noting.py").write_text(NOTING)
    code, out, err = torchrun(2, where / "noting.py", f"{where}", *argv)
    return code, err, out, {path.name[-1]: path.read_text() for path in where.glob("code-*")}


@pytest.fixture(scope="module")
def shared(flags, tmp_path_factory):
    """(folder around it, stdout) of the same run by two processes."""
    where = tmp_path_factory.mktemp("shared")
    code, err, out, notes = noting(where, *flags(where / "run"))
    assert code == 0 and notes == dict.fromkeys("01", "0 checkpoint-2 checkpoint-4"), err
    return where, out


def until_step_2(folder, copied):
    """A copy of a run's folder as it was when step 2 had been saved."""
    shutil.copytree(folder, copied)
    shutil.rmtree(copied / "checkpoint-4")
    return copied


def test_two_processes_do_what_one_does_and_send_no_rollout(whole, shared):
    """Same tokens sampled, same anchors searched and found, same metrics, and a checkpoint that differs by
    rounding. Only one of them speaks, and the comparison means something: anchors were accepted, weights
    have moved. Nothing that was sent, gradients and weights apart, is as large as the ids and log-probs of
    one of two groups of 8 rollouts."""
    where, out = shared
    assert_same_run(where / "run", whole)
    assert out.count("step 4/4") == 1 and out.count("method   bread") == 1
    assert sum(row.get("anchor/accepted", 0) for row in read_lines(whole / "metrics.jsonl")) >= 2
    start = load_file(CHAIN / "model" / "model.safetensors")
    final = load_file(whole / "checkpoint-4" / "model.safetensors")
    assert max((final[name].float() - start[name].float()).abs().max().item() for name in start) > 3 * LR
    mean_length = min(row["completions/mean_length"] for row in read_lines(whole / "metrics.jsonl")[1:])
    a_group = 8 * len(pickle.dumps([[1000] * round(mean_length), [-0.1] * round(mean_length)]))
    assert max(int((where / f"size-{rank}").read_text()) for rank in (0, 1)) < a_group


def test_one_process_resumes_what_two_have_saved(flags, whole, shared, tmp_path):
    """Step 2 of the run by two, continued by one, ends where the run by one ended."""
    folder = until_step_2(shared[0] / "run", tmp_path / "run")
    assert bread.main(flags(folder, "--resume")) == 0
    assert_same_run(folder, whole)


def test_two_processes_resume_what_one_has_saved(flags, whole, tmp_path):
    """And the other way round; each process finds its own part of the optimizer's state."""
    folder = until_step_2(whole, tmp_path / "run")
    code, _, err = torchrun(2, ROOT / "bread.py", *flags(folder, "--resume"))
    assert code == 0, err
    assert_same_run(folder, whole)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_signal_to_one_process_ends_the_run_with_all_that_was_saved(flags, whole, tmp_path, number):
    """To one of two in step 3. SIGKILL: torchrun fails, neither gets to its end, the checkpoint of step 2
    loads. SIGINT: both finish the step and exit with 130, and the one that does not save waits for the one
    that does, which torchrun would otherwise tell to end, and kill half a minute later. The run resumes
    and ends where the unbroken one did."""
    (tmp_path / "method.py").write_text(BREAKING.format(number=int(number)))
    command = flags(tmp_path / "run", "--method", f"{tmp_path / 'method.py'}:method")
    code, err, _, notes = noting(tmp_path, *command)
    assert code != 0 and "bread.py: " not in err, err
    is_kill = number == signal.SIGKILL
    assert notes == ({} if is_kill else dict.fromkeys("01", "130 checkpoint-2 checkpoint-3"))
    steps = [row["step"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert steps == ([0, 1, 2] if is_kill else [0, 1, 2, 3])
    Transformer.from_pretrained(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "method.py").write_text("import bread\nmethod = bread.bread\n")
    assert bread.main([*command, "--resume"]) == 0
    assert_same_run(tmp_path / "run", whole)


# ---------------------------------------------------------------- more processes than problems, other options


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ["--kl", "0.05", "--importance-cap", "1.5", "--loss-mean", "sequence", "--recompute", "--on-fail",
     "resample"],
    ["--method", "grpo", "--no-std", "--sample-batch-size", "5", "--warmup-steps", "3"],
    ["--method", "sft", "--lr-decay", "0.5"],
    ["--anchor-placement", "hint", "--temperature", "0.8"]], ids=lambda options: options[1])
def test_three_processes_with_two_problems_do_what_one_does(flags, tmp_path, options):
    """One process has nothing to sample and nothing to train on in any step, but its part of the
    optimizer's state and one of three held-out problems: the same run as by one process, whatever the
    options."""
    more = ["--problems-per-step", "2", *options]
    assert bread.main(flags(tmp_path / "one", *more)) == 0
    code, _, err = torchrun(3, ROOT / "bread.py", *flags(tmp_path / "three", *more))
    assert code == 0, err
    assert_same_run(tmp_path / "three", tmp_path / "one")
    assert all(row["grad_norm"] > 0 for row in read_lines(tmp_path / "one" / "metrics.jsonl") if row["step"])


@pytest.mark.slow
def test_two_processes_evaluate_and_refuse_as_one_does(flags, data, tmp_path, capsys):
    """--eval prints one line, the same as by one process, and leaves no folder. Bad input of which only
    the process that writes knows, a folder with a run in it, ends all of them, and not after an hour."""
    command = ["--model", f"{CHAIN / 'model'}", "--eval", "--eval-data", f"{data / 'heldout.jsonl'}",
               "--max-new-tokens", "72", "--eval-samples", "4", "--device", "cpu", "--output",
               f"{tmp_path / 'eval'}"]
    assert bread.main(command) == 0
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
