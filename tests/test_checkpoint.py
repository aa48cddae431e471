"""Claims about checkpoint.py: no crash, full disk or bad copy costs a checkpoint; what is read is what was saved.

Crashes are real: a forked child is killed (SIGKILL), meets a file size limit, or has no right to write.
"""
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import RunFolder, load

NAN = float("nan")


def in_child(function):
    """Exit code of a forked process that runs `function`: 0 when it returned, 1 when it raised, -9 when killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_me(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(lines_left, function):
    """Exit code of `in_child(function)`, killed once it has run that many lines of checkpoint.py."""
    def trace(frame, event, _):
        nonlocal lines_left
        if frame.f_code.co_filename == checkpoint.__file__:
            lines_left -= event == "line"
            if lines_left < 0:
                kill_me()
            return trace

    return in_child(lambda: (sys.settrace(trace), function()))


def write_model(folder):
    """A stand-in for a Hugging Face folder: one weight file, one text file, one that is empty."""
    save_file({"weight": torch.ones(4)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    (folder / "merges.txt").write_text("")


def save(folder, step, **changes):
    arguments = {"write_model": write_model, "tensors": {"moment": torch.full((50,), step)}, "meta": {"step": step}}
    return folder.save(step, **arguments | changes)


def names(path):
    return sorted(entry.name for entry in path.iterdir() if entry.name != ".lock")


def refusal(*arguments, **keywords):
    """The text with which a RunFolder is refused."""
    with pytest.raises(ValueError) as error:
        RunFolder(*arguments, **keywords)
    return str(error.value)


@pytest.fixture
def run(tmp_path):
    """A new run's folder, which already wrote run.json."""
    folder = RunFolder(tmp_path / "run")
    folder.write_json("run.json", {"seed": 0})
    yield folder
    folder.close()


# ---------------------------------------------------------------- what is read is what was saved


def test_tensors_come_back_bit_for_bit(run):
    """Every dtype, NaN, minus zero, scalars, empty and transposed tensors: `load` gives the same bytes."""
    tensors = {
        "float32": torch.tensor([0.1, NAN, -math.inf, -0.0, 1e-45]), "bfloat16": torch.randn(3, 5).bfloat16(),
        "float64": torch.randn(2, dtype=torch.float64), "random state": torch.get_rng_state(),
        "int64": torch.tensor([2**62]), "bool": torch.tensor([True, False]), "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3), "transposed": torch.arange(6.0).view(2, 3).T,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    loaded, _ = load(save(run, 1, tensors=tensors))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        ours, theirs = (t.detach().flatten().view(torch.uint8) for t in (loaded[name], tensor))
        assert torch.equal(ours, theirs), name  # as bytes, because NaN does not equal itself


def test_meta_comes_back_bit_for_bit(run):
    """Floats to the last bit, NaN and infinities included, big integers, text, None and nesting come back."""
    meta = {"lr": 0.1 + 0.2, "best": -math.inf, "seed": 2**80, "text": "数 \ud83d", "rows": [{"a": [], "b": None}]}
    _, loaded = load(save(run, 1, meta=meta | {"nan": NAN}))
    assert math.isnan(loaded.pop("nan"))
    assert loaded == meta


def test_loaded_tensors_outlive_their_checkpoint(run):
    """What was loaded is no view of the file: even one that is overwritten in place changes nothing."""
    path = save(run, 1)
    tensors, _ = load(path)
    with open(path / checkpoint.TENSORS, "r+b") as file:
        file.write(bytes(os.path.getsize(path / checkpoint.TENSORS)))
    assert tensors["moment"].tolist() == [1] * 50


def take_steps(parameters, optimizer, count):
    for _ in range(count):
        sum((parameter.sin() ** 2).sum() for parameter in parameters).backward()
        optimizer.step()
        optimizer.zero_grad()


def make_optimizer(values):
    """(copies of the values as parameters, an AdamW of two groups over them)"""
    parameters = [value.clone().requires_grad_() for value in values]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
    return parameters, torch.optim.AdamW(groups, lr=1e-2)


def assert_same_state(parameters, optimizer, expected, expected_optimizer):
    """Values and everything that AdamW keeps for each of them, bit for bit."""
    for ours, theirs in zip(parameters, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert optimizer.state[ours].keys() == expected_optimizer.state[theirs].keys() != set()
        for name, value in expected_optimizer.state[theirs].items():
            assert torch.equal(optimizer.state[ours][name], value), name


START = [torch.randn(3, 4), torch.randn(5), torch.randn(2), torch.randn(5)]


def test_an_optimizer_goes_on_as_if_it_had_never_stopped(run):
    """Six AdamW steps equal three, a save, a load into a fresh model and optimizer, and three more, bit for bit."""
    straight, optimizer = make_optimizer(START)
    take_steps(straight, optimizer, 3)
    numbers = [7, 2, 11, 10]  # of a larger model's parameters, in the optimizer's order
    tensors = checkpoint.optimizer_tensors(optimizer, numbers)
    assert {name for name in tensors if name.startswith("11.")} == {
        "11.master", "11.step", "11.exp_avg", "11.exp_avg_sq"} and len(tensors) == 16
    path = save(run, 3, tensors=tensors)
    take_steps(straight, optimizer, 3)

    resumed, fresh = make_optimizer([torch.zeros_like(value) for value in START])
    checkpoint.restore_optimizer(fresh, load(path)[0], numbers)
    take_steps(resumed, fresh, 3)
    assert_same_state(resumed, fresh, straight, optimizer)


@pytest.mark.parametrize("owners", [([0, 2], [3, 1]), ([1], [0, 3, 2]), ([0, 1, 2, 3],)])
def test_an_optimizer_state_is_restored_however_the_parameters_were_split(run, owners):
    """What several processes saved, each its own parameters, is what one would have saved, name for name and bit for
    bit; and each process finds the state of its own in it, equal shapes (5,) not mixed up."""
    whole, optimizer = make_optimizer(START)
    take_steps(whole, optimizer, 3)
    together = checkpoint.optimizer_tensors(optimizer, range(4))
    apart = {}
    for numbers in owners:
        mine, part = make_optimizer([START[number] for number in numbers])
        checkpoint.restore_optimizer(part, together, numbers)
        assert_same_state(mine, part, [whole[number] for number in numbers], optimizer)
        apart |= checkpoint.optimizer_tensors(part, numbers)
    assert apart.keys() == together.keys()
    assert all(torch.equal(apart[name], together[name]) for name in together)


def test_optimizer_state_of_another_model_is_refused():
    """Other shapes, another order, or parameters that are not there, are a ValueError before anything is copied."""
    def make(*shapes):
        return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes])

    saved = checkpoint.optimizer_tensors(make(3, 5), [0, 1])
    saved = {name: tensor + 1 for name, tensor in saved.items()}
    for shapes, numbers in (((3, 4), (0, 1)), ((5, 3), (0, 1)), ((3, 5, 6), (0, 1, 2)), ((3, 3), (0, 2)), ((3,), (9,))):
        other = make(*shapes)
        with pytest.raises(ValueError, match="other shapes"):
            checkpoint.restore_optimizer(other, saved, numbers)
        assert all((parameter == 0).all() for parameter in checkpoint.parameters_of(other))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_allows(run, umask):
    """safetensors writes 0600 whatever the umask; a checkpoint's files are 0666 without the bits of the umask."""
    before = os.umask(umask)
    try:
        path = save(run, 1)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_a_checkpoint_is_a_model_folder_to_every_reader(run):
    """vLLM and SGLang load every *.safetensors of a folder as weights: beside the model's there is none."""
    path = save(run, 1)
    assert [file.name for file in path.rglob("*.safetensors")] == ["model.safetensors"]
    assert load_file(path / checkpoint.TENSORS).keys() == {"moment"}  # the format is safetensors all the same


# ---------------------------------------------------------------- crashes


@pytest.mark.parametrize("killed_in", ["write_model", "save_file", "seal"])
def test_a_kill_during_a_save_costs_only_that_save(run, monkeypatch, killed_in):
    """SIGKILL while model, tensors or record are written: the old checkpoint loads, the rest is removed."""
    save(run, 1)
    run.close()

    def child():
        other = RunFolder(run.path, resume=True)
        if killed_in == "write_model":
            save(other, 2, write_model=kill_me)
        monkeypatch.setattr(checkpoint, killed_in, kill_me)
        save(other, 2)

    assert in_child(child) == -signal.SIGKILL
    assert "checkpoint-2.tmp" in names(run.path)
    resumed = RunFolder(run.path, resume=True)
    assert names(run.path) == ["checkpoint-1", "run.json"]
    newest, skipped = resumed.latest()
    assert (newest.name, skipped, load(newest)[1]) == ("checkpoint-1", [], {"step": 1})
    resumed.close()


def test_killed_at_any_line_a_replaced_checkpoint_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    """The hardest save replaces the only checkpoint there is. It is killed after 0 lines of checkpoint.py, after 3,
    after 6, ... until it gets through: each time the folder resumes, wholly old or wholly new."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # only a power loss would make a difference
    template = RunFolder(tmp_path / "template")
    save(template, 1, meta="old")
    template.close()
    seen, lines, code = [], 0, -signal.SIGKILL
    while code != 0:
        path = shutil.copytree(template.path, tmp_path / f"{lines}")
        folder = RunFolder(path, resume=True)
        code = killed_after(lines, lambda: save(folder, 1, meta="new", keep=1))
        assert code in (0, -signal.SIGKILL)
        folder.close()
        folder = RunFolder(path, resume=True)
        newest, skipped = folder.latest()
        seen.append(load(newest)[1])
        assert skipped == [] and names(path) == ["checkpoint-1"]
        folder.close()
        lines += 3
    turn = seen.index("new")
    assert turn > 10 and seen == ["old"] * turn + ["new"] * (len(seen) - turn)


def test_killed_at_any_line_a_json_file_is_the_old_one_or_the_new_one(run):
    """run.json is replaced all at once: after a kill at any line of checkpoint.py it can be read."""
    seen, code = [], -signal.SIGKILL
    while code != 0:
        code = killed_after(len(seen), lambda: run.write_json("run.json", {"seed": 1}))
        seen.append(run.read_json("run.json")["seed"])
        run.write_json("run.json", {"seed": 0})
    turn = seen.index(1)
    assert turn > 5 and seen == [0] * turn + [1] * (len(seen) - turn)


def test_every_byte_is_on_the_disk_before_the_name(run, monkeypatch):
    """A power loss undoes what was not flushed: all files are, then trainer.json, its folder, and the rename."""
    flushed, flush = [], checkpoint.flush_to_disk
    monkeypatch.setattr(checkpoint, "flush_to_disk", lambda path: (flush(path), flushed.append(path.name)))
    path = save(run, 1)
    assert set(flushed[:-3]) == set(names(path)) - {"trainer.json"}
    assert flushed[-3:] == ["trainer.json.tmp", "checkpoint-1.tmp", "run"]


def test_a_full_disk_leaves_the_old_checkpoint_and_no_part_of_the_new_one(run):
    """A file that cannot grow (RLIMIT_FSIZE), of the model or of the tensors, ends in an OSError that says so."""
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        for changes in ({"write_model": lambda folder: (folder / "config.json").write_text("x" * 3000)},
                        {"tensors": {"moment": torch.zeros(1000)}}):
            with pytest.raises(OSError, match="checkpoint-2 could not be saved, older .* File too large"):
                save(run, 2, **changes)

    path = save(run, 1)
    assert in_child(child) == 0
    assert names(run.path) == ["checkpoint-1", "run.json"] and load(path)[1] == {"step": 1}


def test_too_little_space_is_noticed_before_the_first_byte(run, monkeypatch):
    """The tensors and half as much for the model must be free; the error names both numbers."""
    usage = shutil.disk_usage(run.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_400_000_000))
    huge = torch.zeros(1).expand(250_000_000)  # 1 GB by its size, 4 bytes in memory
    with pytest.raises(OSError, match="1.50 GB are needed, 1.40 GB are free"):
        save(run, 1, tensors={"moment": huge}, write_model=lambda folder: pytest.fail("began to write"))
    assert names(run.path) == ["run.json"]


def test_an_error_of_the_model_surfaces_as_it_is(run):
    """What `write_model` raises is no matter of the disk: it passes through, and the unfinished folder goes."""
    def broken(folder):
        write_model(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(run, 1, write_model=broken)
    with pytest.raises(TypeError):
        save(run, 1, meta={"not JSON": object()})
    assert names(run.path) == ["run.json"]


# ---------------------------------------------------------------- bad copies


DAMAGE = {
    "trainer.tensors truncated": ("trainer.tensors", lambda file: os.truncate(file, 100)),
    "model truncated": ("model.safetensors", lambda file: os.truncate(file, 10)),
    "model missing": ("model.safetensors", os.remove),
    "empty file missing": ("merges.txt", os.remove),
    "file longer": ("config.json", lambda file: file.write_text("{} and more")),
    "record missing": ("trainer.json", os.remove),
    "record truncated": ("trainer.json", lambda file: os.truncate(file, 20)),
    "record binary": ("trainer.json", lambda file: file.write_bytes(b"\xff\x00")),
    "record foreign": ("trainer.json", lambda file: file.write_text('{"epoch": 3}')),
    "record no object": ("trainer.json", lambda file: file.write_text("3")),
}


@pytest.mark.parametrize("name, damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_checkpoint_is_skipped_and_named(run, name, damage):
    """Truncated, half-copied, changed in size: resume falls back to the one before and names the file at fault."""
    save(run, 1)
    damaged = save(run, 2)
    damage(damaged / name)
    run.close()
    resumed = RunFolder(run.path, resume=True)
    newest, (line,) = resumed.latest()
    assert newest.name == "checkpoint-1"
    assert line.startswith("checkpoint-2 is incomplete and was skipped: ") and str(damaged / name) in line
    with pytest.raises(ValueError, match=name):
        load(damaged)
    resumed.close()


def test_damaged_tensors_of_the_right_size_are_an_error_with_the_file_name(run):
    """What sizes cannot show, such as a preallocated file that was never filled, safetensors' own checks do."""
    file = save(run, 1) / "trainer.tensors"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match="trainer.tensors is damaged .* resume from an older one"):
        load(file.parent)


def test_a_folder_that_is_no_checkpoint_is_an_error_with_the_file_name(tmp_path):
    """`load` of any other folder says which file it missed."""
    with pytest.raises(ValueError, match="trainer.json is missing or damaged"):
        load(tmp_path)


# ---------------------------------------------------------------- which checkpoints stay


def test_only_the_newest_checkpoints_stay(run):
    """`keep` counts by step, not by name or age: 10 is newer than 9. None and 0 keep all."""
    for step in (1, 8, 9, 10):
        save(run, step, keep=2)
    assert names(run.path) == ["checkpoint-10", "checkpoint-9", "run.json"]
    for step, keep in ((11, 0), (12, None)):
        save(run, step, keep=keep)
    assert len(names(run.path)) == 5
    save(run, 13, keep=1)
    assert names(run.path) == ["checkpoint-13", "run.json"]


def test_damaged_later_checkpoints_do_not_push_out_sound_ones(run):
    """After a fall-back from step 8 to 4, steps 5 and 6 stay; step 8 is replaced when the run gets there again."""
    for step in (4, 8):
        save(run, step)
    (run.path / "checkpoint-8" / "trainer.json").unlink()
    for step in (5, 6):
        save(run, step, keep=2)
    assert names(run.path) == ["checkpoint-5", "checkpoint-6", "checkpoint-8", "run.json"]
    assert run.latest()[0].name == "checkpoint-6"
    save(run, 8, keep=2)
    assert run.latest() == (run.path / "checkpoint-8", [])


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(run, monkeypatch):
    """Cleaning up old checkpoints may fail, for instance while somebody reads one over NFS; training goes on."""
    save(run, 1)
    remove = shutil.rmtree

    def busy(path, ignore_errors=False):
        if path.name != "checkpoint-1":
            remove(path)
        elif not ignore_errors:
            raise OSError("busy")

    monkeypatch.setattr(shutil, "rmtree", busy)
    save(run, 2, keep=1)
    assert run.latest() == (run.path / "checkpoint-2", [])


# ---------------------------------------------------------------- who may write


def test_a_folder_with_a_run_is_refused_and_left_as_it_is(run):
    """Without --resume or --overwrite, or with both, nothing is written, and the error says what to type."""
    save(run, 1)
    run.close()
    before = names(run.path)
    for keywords in ({}, {"resume": True, "overwrite": True}):
        text = refusal(run.path, **keywords)
        assert str(run.path) in text and "already holds a run" in text
        assert "--resume" in text and "--overwrite" in text and "--output" in text
    (run.path / "run.json").unlink()
    assert "already holds a run" in refusal(run.path)  # a checkpoint alone is a run, too
    assert names(run.path) == before[:-1]


def test_resume_needs_a_complete_checkpoint(tmp_path):
    """A missing folder, an empty one, and one whose only checkpoint is damaged, which the error names."""
    assert "no complete checkpoint to resume from" in refusal(tmp_path / "nowhere", resume=True)
    folder = RunFolder(tmp_path / "run")
    folder.write_json("run.json", {})
    (save(folder, 3) / "config.json").unlink()
    folder.close()
    text = refusal(folder.path, resume=True)
    assert "--overwrite" in text and "checkpoint-3 is incomplete" in text
    assert "config.json has none of 2 bytes" in text


def test_overwrite_removes_what_a_run_writes_and_nothing_else(run):
    """Notes, foreign folders and files with similar names survive; checkpoints, logs and left-overs go."""
    save(run, 1)
    for name in ("metrics.jsonl", "samples.jsonl"):
        run.append(name, {"step": 1})
    run.close()
    for name in ("notes.txt", "metrics.jsonl.bak", "checkpoint-best.txt"):
        (run.path / name).write_text("mine")
    for name in ("checkpoint-2.tmp", "checkpoint-best", "plots"):
        (run.path / name).mkdir()
    RunFolder(run.path, overwrite=True).close()
    assert names(run.path) == ["checkpoint-best", "checkpoint-best.txt", "metrics.jsonl.bak", "notes.txt", "plots"]


def test_overwrite_refuses_the_checkpoints_of_another_trainer(tmp_path):
    """Many trainers write checkpoint-500: one without our trainer.json, and what is beside it, is not ours."""
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "run.json").write_text("{}")
    assert "checkpoint-500 is not of a run of ours" in refusal(tmp_path, overwrite=True)
    assert names(tmp_path) == ["checkpoint-500", "run.json"]


def test_only_one_process_writes_into_a_folder(run):
    """A second one is refused with the folder's name, resume and overwrite included, until the first lets go."""
    save(run, 1)

    def child():
        for keywords in ({}, {"resume": True}, {"overwrite": True}):
            text = refusal(run.path, **keywords)
            assert str(run.path) in text and "in use by another process" in text

    assert in_child(child) == 0
    run.close()
    assert in_child(lambda: RunFolder(run.path, resume=True)) == 0


def test_a_killed_process_leaves_no_lock(tmp_path):
    """The system releases the lock of a process that was killed: nobody has to remove a file by hand."""
    assert in_child(lambda: kill_me(RunFolder(tmp_path / "run"))) == -signal.SIGKILL
    RunFolder(tmp_path / "run").close()


def test_a_refused_folder_is_not_left_locked(run):
    """After a refusal the same process can open the folder in another way."""
    run.close()
    refusal(run.path)
    RunFolder(run.path, overwrite=True).close()


def test_a_folder_that_cannot_be_written_is_an_early_error(tmp_path):
    """Read-only, or a file: ValueError before training begins, not OSError at the first save."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(path) in refusal(path) and "--output" in refusal(path)

    public = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    (public / ".lock").touch()
    (public / ".lock").chmod(0o666)  # left by another user's run: it can be opened, but nothing beside it be made
    public.chmod(0o555)

    def child():
        if os.geteuid() == 0:
            os.setuid(65534)  # to root, nothing is read-only
        assert "is no folder that can be written" in refusal(public)

    code = in_child(child)
    shutil.rmtree(public)
    assert code == 0


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    """Runs are often links to a bigger disk: the run is written there, and the link is never replaced."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    for keywords in ({}, {"resume": True}, {"overwrite": True}):
        folder = RunFolder(tmp_path / "run", **keywords)
        folder.write_json("run.json", {})
        save(folder, 1)
        folder.close()
    assert (tmp_path / "run").is_symlink() and names(tmp_path / "disk") == ["checkpoint-1", "run.json"]


def test_the_file_can_be_imported_without_posix(monkeypatch):
    """Windows has no fcntl: the import works, so that everything but training does."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("checkpoint_elsewhere", checkpoint.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


# ---------------------------------------------------------------- logs


def test_logs_are_plain_json(run):
    """NaN and infinities are null at any depth; text stays readable; half a surrogate pair stays JSON."""
    row = {"step": 1, "loss": NAN, "nested": [{"kl": math.inf}, (-math.inf, 0.1)], "text": "数\u2028\n\ud83d"}
    run.append("metrics.jsonl", row)
    run.write_json("run.json", row)
    plain = {**row, "loss": None, "nested": [{"kl": None}, [None, 0.1]]}
    for name in ("metrics.jsonl", "run.json"):
        text = (run.path / name).read_bytes().decode("utf-8")
        assert json.loads(text, parse_constant=pytest.fail) == plain and "数" in text
    assert (run.path / "metrics.jsonl").read_bytes().count(b"\n") == 1
    assert run.read_json("run.json") == plain


def test_a_row_is_in_the_file_as_soon_as_it_was_appended(run):
    """A kill right after `append` loses nothing."""
    def child():
        for step in range(3):
            run.append("metrics.jsonl", {"step": step})
        kill_me()

    assert in_child(child) == -signal.SIGKILL
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full")
def test_a_full_disk_is_an_error_of_the_row_that_met_it(run):
    """/dev/full takes bytes into a buffer and refuses them later: `append` waits for that."""
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        run.append("metrics.jsonl", {"step": 1})


@pytest.mark.parametrize("end", [b"", b'{"step": 3, "lo', b'{"step": 3}', b'{"text": "\xe6\x95', b"\x00\x00"])
def test_truncate_leaves_the_rows_up_to_a_step(run, end):
    """Rows of later steps and a line that a crash cut short, even within a character, go; others stay as is."""
    whole = b'{"step": 1, "a": 0.10}\n{"note": "no step"}\n{"step":2}\n{"step": 2, "text": "\xe2\x80\xa8"}\n'
    path = run.path / "metrics.jsonl"
    path.write_bytes(whole + b'{"step": 3}\n' + end)
    run.truncate("metrics.jsonl", 2)
    assert path.read_bytes() == whole
    run.append("metrics.jsonl", {"step": 3})
    assert path.read_bytes() == whole + b'{"step": 3}\n'


def test_truncate_keeps_a_whole_row_that_lacks_only_its_line_feed(run):
    """An object that parses is complete; the next row begins on a line of its own."""
    (run.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    run.truncate("metrics.jsonl", 2)
    assert (run.path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_truncate_of_a_missing_file_does_nothing(run):
    """A run that wrote no samples resumes without them."""
    run.truncate("samples.jsonl", 5)
    assert names(run.path) == ["run.json"]


def test_a_damaged_json_file_is_an_error_with_its_name(run):
    """Cut short, or missing: ValueError."""
    (run.path / "run.json").write_text('{"seed"')
    for name in ("run.json", "missing.json"):
        with pytest.raises(ValueError, match=f"{name} is missing or damaged"):
            run.read_json(name)
