"""Claims about parallel.py: master weights, and several processes that do what one does and lose nothing.

Processes are real: started by torchrun on this machine, joined over gloo, on the CPU. They train the embedded
example at a small learning rate: sums in another order differ in their last bits, which AdamW may turn into a
share of --lr.
"""
import copy
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import bread
from conftest import ROOT, read_lines
from model import Transformer
from parallel import MasterAdamW, Ranks

pytestmark = pytest.mark.usefixtures("one_thread")  # as the processes have it: OMP_NUM_THREADS=1


class Late(Ranks):
    """Gets a signal while the processes agree on whether there was one."""

    def gather(self, mine):
        self.signal = signal.SIGINT
        return [mine]


def test_tensors_of_a_borrower_are_nobodys():
    """An average of weights beside the optimizer's, by any name: not owned, and not in the way."""
    optimizer = MasterAdamW([torch.nn.Parameter(torch.ones(2))], Ranks("cpu"))
    assert optimizer.owns("0.master")
    assert not any(optimizer.owns(name) for name in ("1.master", "ema.w", "ema", ""))
    optimizer.restore({**dict(optimizer.state()), "ema.w": torch.zeros(3)})


def test_one_process_joins_nobody_and_loses_no_signal():
    """A signal that comes when all have said that there was none ends the run after the next step; the second
    one of its kind is the system's again."""
    ranks, items = Ranks("cpu"), {"a": 1, "b": 2.5}
    assert ranks.share([1, 2, 3]) == [1, 2, 3] and ranks.gather(items) == [items]
    assert ranks.from_first(items) == ranks.total(items) == items
    late = Late("cpu")
    assert [late.interrupted(), late.interrupted(), late.signal] == [False, True, signal.SIGINT]
    before = signal.getsignal(signal.SIGTERM)
    ranks.listen(0)
    assert not ranks.interrupted()
    os.kill(os.getpid(), signal.SIGTERM)
    assert ranks.interrupted() and ranks.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ranks.leave()
    assert signal.getsignal(signal.SIGTERM) is before


def test_float32_masters_add_up_what_bf16_weights_would_lose():
    """AdamW moves a weight by about lr = 1e-6 a step. A bf16 weight of 0.1 has neighbours 5e-4 away, so a
    single step leaves it where it is; 600 steps must not. Masters are float32, weights their rounding."""
    weight = torch.nn.Parameter(torch.full((8,), 0.1, dtype=torch.bfloat16))
    start = weight.detach().clone()
    optimizer = MasterAdamW([weight], Ranks("cpu"))
    for number in range(600):
        assert number != 1 or torch.equal(weight, start)
        weight.grad = torch.ones(weight.shape)
        optimizer.step(1e-6, max_norm=1.0)
    master = dict(optimizer.state())["0.master"]
    assert master.dtype == torch.float32 and torch.equal(weight, master.bfloat16()) and (weight < start).all()
    torch.testing.assert_close(master, start.float() - 600e-6, rtol=0, atol=2e-6)


def gradients(weights, seed):
    """Random float32 gradients for all weights."""
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


def make_optimizer(dtype, *shapes, offload=False):
    """An optimizer of random weights, always the same."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    return MasterAdamW(weights, Ranks("cpu"), weight_decay=0.1, offload=offload)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_torchs_adamw_on_float32_weights(dtype):
    """State in host memory or not: bit for bit the same; in slices of 7 (whose last elements take another
    path through the same arithmetic) within some roundings, as torch's. Weights are their masters' rounding.
    The norm is that before clipping."""
    theirs = [torch.nn.Parameter(weight.detach().float())
              for weight in make_optimizer(dtype, (30, 4), (5,)).weights]
    adamw = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    ours = [make_optimizer(dtype, (30, 4), (5,), offload=offload) for offload in (False, True, False)]
    ours[2].slice_size = 7
    for number in range(4):
        gradients(theirs, number)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0).item()
        adamw.step()
        for optimizer in ours:
            gradients(optimizer.weights, number)
            assert optimizer.step(1e-2, max_norm=1.0) == pytest.approx(norm, rel=1e-6)
    states = [dict(optimizer.state()) for optimizer in ours]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        torch.testing.assert_close(states[2][name], tensor, rtol=1e-5, atol=1e-6)
    for i, expected in enumerate(theirs):
        master = states[0][f"{i}.master"]
        torch.testing.assert_close(master, expected.data, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(optimizer.weights[i], master.to(dtype)) for optimizer in ours[:2])


def test_a_master_is_its_weight_and_16_bits():
    """All kinds of float32 numbers come back bit for bit, but those halfway between two bf16 numbers whose
    rounding goes down: they may come back as the float32 number before."""
    kinds = [0.0, -0.0, 1e-40, -1e-40, 1.0, 1.00390625, -1.00390625, 1.01171875, 3.38e38, 2.0**-126]
    numbers = torch.cat([torch.randn(10_000) * torch.logspace(-30, 30, 10_000), torch.tensor(kinds)])
    optimizer = make_optimizer(torch.bfloat16, numbers.shape)
    optimizer.set_master(0, slice(None), numbers)
    back = optimizer.master(0, slice(None))
    bits, expected = back.view(torch.int32), numbers.view(torch.int32)
    is_half = expected & 0xFFFF == 0x8000
    assert torch.equal(optimizer.weights[0].data, numbers.bfloat16())
    assert torch.equal(bits[~is_half], expected[~is_half]) and is_half.sum() >= 3
    assert ((expected - bits)[is_half] <= 1).all() and ((expected - bits)[is_half] >= 0).all()


def test_micro_batches_add_up_in_float32():
    """256 gradients of 1/256 onto 1: in bf16, where 1 + 1/256 is 1, they would be lost."""
    optimizer = make_optimizer(torch.bfloat16, (3,))
    weight = optimizer.weights[0]
    for share in (1.0, *[1 / 256] * 256):
        (weight * share).sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.tolist() == [2.0] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizers_state_survives_a_round_trip(dtype):
    """A second optimizer that restores it steps on bit for bit; another model's state is refused. Moments get
    the clipped gradient, and float32 weights are their own masters."""
    def step(optimizer, seed):
        gradients(optimizer.weights, seed)
        assert optimizer.step(1e-2, max_norm=1e-3) > 1
        assert all(weight.grad is None for weight in optimizer.weights)
    first, second = make_optimizer(dtype, (3, 4), (5,)), make_optimizer(dtype, (3, 4), (5,))
    is_own = first.master(0, slice(None)).data_ptr() == first.weights[0].data_ptr()
    assert is_own == (dtype == torch.float32)
    step(first, 1)
    moments = torch.cat([dict(first.state())[f"{i}.exp_avg"].flatten() for i in (0, 1)])
    assert moments.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)  # (1 - beta_1) clip
    second.restore(copy.deepcopy(dict(first.state())))
    step(first, 2)
    step(second, 2)
    ours, theirs = dict(first.state()), dict(second.state())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(a, b) for a, b in zip(first.weights, second.weights))
    for others in (make_optimizer(dtype, (3, 5), (5,)), make_optimizer(dtype, (3, 4), (5,), (2,))):
        with pytest.raises(ValueError, match="other shapes"):
            others.restore(ours)


def torchrun(num, script, *argv):
    """(exit code, stdout, stderr) of a script in several processes, joined over the loopback interface. The
    agent chooses a free port itself; if it hangs it is told to end its processes, too."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
               "--nproc-per-node", f"{num}", f"{script}", *argv]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}"}
    if sys.platform == "linux":  # whatever this machine's name resolves to
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True)
    try:
        out, err = process.communicate(timeout=200)
        return process.returncode, out, err
    finally:
        process.terminate()
        process.wait()


THREE = """
import torch
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
weights = [torch.nn.Parameter(torch.full((size,), 1.0, dtype=torch.bfloat16)) for size in (4, 9, 5, 2)]
optimizer = MasterAdamW(weights, ranks)
names = [name for name, _ in optimizer.state()]
assert len(names) in (4, 8) and all(map(optimizer.owns, names))
assert sorted(sum(ranks.gather(names), [])) == sorted(
    f"{i}.{kind}" for i in range(4) for kind in ("master", "step", "exp_avg", "exp_avg_sq"))
for loss, expected in ((0.0, 20**0.5 * (0 + 1 + 2)), (float("nan") if rank == 1 else 0.0, None)):
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        has_grad = len(weight) != 2 or rank
        weight.grad = torch.full(weight.shape, float(rank)) if has_grad else None
    norm = optimizer.step(0.25, 1.0, loss)
    assert norm is expected is None or abs(norm - expected) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(before, weights)) == (expected is None)
    for weight in weights:
        assert all(torch.equal(weight, other) for other in ranks.gather(weight.detach()))
ranks.leave()
"""


def test_three_processes_share_sum_and_step(tmp_path):
    """Sums are exact beyond 2^53; parameters are dealt out, each to one rank. A step sums all gradients, a
    missing one counting as 0; where one rank has a NaN nobody steps."""
    (tmp_path / "three.py").write_text(THREE)
    code, _, err = torchrun(3, tmp_path / "three.py")
    assert code == 0, err


# Three problems a step, two of which belong to one of two processes; every failed problem without an anchor
# gets its expert's trace, so that every step has a gradient.
STEPS = ("--steps 4 --save-every 2 --on-fail expert --lr 1e-5 --updates-per-batch 2 --micro-batch-tokens 300 "
         "--weight-decay 0.1 ")


def train(num, argv):
    """Stdout of a run by so many processes, which must end well."""
    if num == 1:
        assert bread.main(argv) == 0
        return ""
    code, out, err = torchrun(num, ROOT / "bread.py", *argv)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    """{number of processes: (folder, stdout) of the run that was not interrupted}."""
    folder = tmp_path_factory.mktemp("runs")
    return {num: (folder / f"{num}", train(num, flags(folder / f"{num}", STEPS))) for num in (1, 2)}


def assert_same_run(folder, whole):
    """Tokens, counts, probes and evaluations equal, other numbers to float32 rounding. Weights and masters
    within 1e-6, a tenth of what one update moves them by; moments to 1e-3 of the largest of their tensor."""
    probes, metrics = ([read_lines(path / f"{name}.jsonl") for path in (folder, whole)]
                       for name in ("probes", "metrics"))
    assert sorted(map(str, probes[0])) == sorted(map(str, probes[1]))
    for ours, theirs in zip(*metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for name in (name for name in theirs if not name.startswith("seconds/")):
            is_count = name.split("/")[0] in ("step", "tokens", "anchor", "eval", "reward", "skipped_updates")
            if not is_count and isinstance(theirs[name], float):
                theirs[name] = pytest.approx(theirs[name], rel=1e-5, abs=1e-5 if name == "entropy" else 1e-6)
            assert ours[name] == theirs[name], name
    for pattern in ("model.safetensors", "trainer-*.tensors"):
        found, expected = ({name: tensor for file in (path / "checkpoint-4").glob(pattern)
                            for name, tensor in load_file(file).items()} for path in (folder, whole))
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            is_moment = key.split(".")[-1] in ("exp_avg", "exp_avg_sq")
            atol = 1e-3 * tensor.abs().max().item() if is_moment else 1e-6
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=atol)


def test_two_processes_do_what_one_does(runs):
    """Tokens, searches, metrics, and a checkpoint that differs by rounding; only one of them speaks. And the
    comparison means something: anchors were accepted, weights have moved."""
    (whole, _), (folder, out) = runs[1], runs[2]
    assert_same_run(folder, whole)
    assert out.count("step 4/4") == 1 and out.count("method   bread") == 1
    rows = read_lines(whole / "metrics.jsonl")[1:]
    assert sum(row["anchor/accepted"] for row in rows) >= 2 and all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("saved_by, resumed_by", [(2, 1), (1, 2)])
def test_any_number_of_processes_resumes_what_others_have_saved(flags, runs, tmp_path, saved_by, resumed_by):
    """From step 2 on it ends where the run by one ended; each finds its part of the optimizer's state."""
    folder = tmp_path / "run"
    shutil.copytree(runs[saved_by][0], folder)
    shutil.rmtree(folder / "checkpoint-4")
    train(resumed_by, flags(folder, STEPS + "--resume"))
    assert_same_run(folder, runs[1][0])


# As bread.py, but each process notes its exit code and which checkpoints there are by then, and lets the
# other do so, too, before it exits.
NOTING = """
import os, pathlib, sys, time
import bread

where = pathlib.Path(__file__).parent
code = bread.main()
saved = sorted(path.name for path in (where / "run").glob("checkpoint-*"))
(where / f"code-{os.environ['RANK']}").write_text(f"{code} {' '.join(saved)}")
until = time.monotonic() + 30
while code == 130 and len(list(where.glob("code-*"))) < 2 and time.monotonic() < until:
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


@pytest.mark.parametrize("number, note, steps", [
    (signal.SIGKILL, None, [0, 1, 2]), (signal.SIGINT, "130 checkpoint-2 checkpoint-3", [0, 1, 2, 3])])
def test_a_signal_to_one_process_ends_the_run_with_what_was_saved(flags, runs, tmp_path, number, note, steps):
    """To one of two in step 3. SIGKILL: torchrun fails, what step 2 saved is there. SIGINT: both finish the
    step and exit with 130; the one that does not save waits for the other, else torchrun would kill it."""
    (tmp_path / "noting.py").write_text(NOTING)
    (tmp_path / "method.py").write_text(BREAKING.format(number=int(number)))
    command = flags(tmp_path / "run", f"{STEPS} --method {tmp_path / 'method.py'}:method")
    code, _, err = torchrun(2, tmp_path / "noting.py", *command)
    assert code != 0 and not (note and "bread.py: " in err), err
    notes = {path.name[-1]: path.read_text() for path in tmp_path.glob("code-*")}
    assert notes in ([{"0": note, "1": note}] if note else [{}, {"0": "1 checkpoint-2"}])
    assert [row["step"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == steps
    Transformer.from_pretrained(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "method.py").write_text("import bread\nmethod = bread.bread\n")
    train(1, [*command, "--resume"])
    assert_same_run(tmp_path / "run", runs[1][0])


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    "--kl 0.05 --importance-cap 1.5 --loss-mean sequence --recompute --on-fail resample",
    "--method grpo --no-std --sample-batch-size 5 --warmup-steps 3 --offload", "--method sft --lr-decay 0.5",
    "--anchor-placement hint --temperature 0.8"])
def test_three_processes_with_two_problems_do_what_one_does(flags, tmp_path, options):
    """One has nothing to sample or train on, but a part of the optimizer's state and a held-out problem."""
    for num in (1, 3):
        train(num, flags(tmp_path / f"{num}", f"{STEPS} --problems-per-step 2 {options}"))
    assert_same_run(tmp_path / "3", tmp_path / "1")
    assert all(row["grad_norm"] > 0 for row in read_lines(tmp_path / "1" / "metrics.jsonl") if row["step"])


@pytest.mark.slow
def test_bad_input_that_one_process_knows_of_ends_all(flags, tmp_path):
    """A folder with a run in it, which the process that writes sees; and not after an hour."""
    (tmp_path / "run.json").write_text("{}")
    code, _, err = torchrun(2, ROOT / "bread.py", *flags(tmp_path))
    assert code != 0 and err.count("bread.py: ") == 1 and "(overwrite)" in err
