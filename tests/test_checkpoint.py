"""Claims about checkpoint.py: no crash, full disk or bad copy costs a checkpoint; what is saved is read.

Crashes are real: a forked child is killed or meets a file size limit.
"""
import array
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import stat
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import RunFolder, load, write_tensors

NAN = float("nan")


def in_child(function):
    """Exit code of a forked process that runs `function`: 0 if it returned, 1 if it raised, -9 if killed."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join()
    return child.exitcode


def kill_me(*_):
    signal.raise_signal(signal.SIGKILL)


def killed_after(lines_left, function):
    """Exit code of `in_child(function)`, killed once it has run that many lines of checkpoint.py."""
    def trace(frame, event, _):
        nonlocal lines_left
        if frame.f_code.co_filename == checkpoint.__file__:
            lines_left -= event == "line"
            return trace if lines_left >= 0 else kill_me()

    return in_child(lambda: (sys.settrace(trace), function()))


def write_model(path):
    """A stand-in for a Hugging Face folder: one weight file, one text file, one that is empty."""
    save_file({"weight": torch.ones(4)}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text("{}")
    (path / "merges.txt").write_text("")


def save(folder, step, write_model=write_model, record=None, tensors=None, keep=2):
    def write(path):
        write_model(path)
        write_tensors(path, 0, (tensors or {"moment": torch.full((50,), step)}).items(), part_bytes=200)

    return folder.save(step, write, record or {"step": step}, 0, keep)


def names(path):
    return sorted(entry.name for entry in path.iterdir() if entry.name != ".lock")


def refusal(path, **keywords):
    """The text with which a RunFolder is refused."""
    with pytest.raises(ValueError) as error:
        RunFolder(path, **keywords)
    return str(error.value)


@pytest.fixture
def folder(tmp_path):
    """A new run's folder with run.json. The path is a link, as to a bigger disk, and stays one."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    folder = RunFolder(tmp_path / "run")
    folder.write_json("run.json", {"seed": 0})
    yield folder
    folder.close()
    assert folder.path.is_symlink()


def test_tensors_and_record_come_back_bit_for_bit(folder):
    """Whoever wrote them: rank 0; rank 1, another process, in three parts; rank 2 has none and makes no file.
    Loaded tensors are no view of the file: zeros over it change nothing, but are refused when loaded."""
    tensors = {
        "float32": torch.tensor([0.1, NAN, -math.inf, -0.0, 1e-45]), "bfloat16": torch.randn(3, 5).bfloat16(),
        "random state": torch.get_rng_state(), "int64": torch.tensor([2**62]), "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3), "transposed": torch.arange(6.0).view(2, 3).T,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }

    def write(path):
        pairs = iter(tensors.items())
        write_tensors(path, 0, itertools.islice(pairs, 3))
        assert in_child(lambda: write_tensors(path, 1, pairs, part_bytes=12)) == 0
        write_tensors(path, 2, [])

    record = {"lr": 0.1 + 0.2, "best": -math.inf, "seed": 2**80, "text": "数 \ud83d", "rows": [{"a": None}]}
    path = folder.save(1, write, record | {"nan": NAN}, num_bytes=0)
    files = ["trainer-0-0.tensors", *(f"trainer-1-{part}.tensors" for part in range(3))]
    assert names(path) == [*files, "trainer.json"]
    loaded, found = load(path, bool)
    for name in files:
        (path / name).write_bytes(bytes((path / name).stat().st_size))
    with pytest.raises(ValueError, match="trainer-.*.tensors is damaged .* resume from an older one"):
        load(path, bool)
    assert math.isnan(found.pop("nan")) and found == record and loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        ours, theirs = (t.detach().flatten().view(torch.uint8) for t in (loaded[name], tensor))
        assert torch.equal(ours, theirs), name  # as bytes, because NaN does not equal itself


def test_memory_holds_one_part_of_what_is_written(tmp_path):
    """Three of the tensors, made when asked for, fill a part: they are gone before the fourth is made."""
    made = []
    alive = []

    def make(i):
        alive.append(sum(memory() is not None for memory in made))
        memory = array.array("i", [i])
        made.append(weakref.ref(memory))
        return torch.frombuffer(memory, dtype=torch.int32)  # keeps `memory` alive, as do its views

    write_tensors(tmp_path, 0, ((f"{i}", make(i)) for i in range(8)), part_bytes=12)
    assert alive == [0, 1, 2, 0, 1, 2, 0, 1] and len(names(tmp_path)) == 3


def test_memory_holds_only_what_is_wanted_of_what_is_read(folder):
    """A process that reads one number does not grow by the 64 MB beside it."""
    def child():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert load(path, "small".__eq__)[0] == {"small": torch.ones(1)}
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KB

    path = save(folder, 1, tensors={"small": torch.ones(1), "large": torch.zeros(2**24)})
    assert in_child(child) == 0


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_checkpoint_is_a_model_folder_to_every_reader(folder, umask):
    """0666 less the umask, though safetensors writes 0600; and servers find no weights but the model's."""
    before = os.umask(umask)
    try:
        path = save(folder, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o666 & ~umask}
    assert [file.name for file in path.rglob("*.safetensors")] == ["model.safetensors"]
    assert load_file(path / "trainer-0-0.tensors").keys() == {"moment"}


def test_a_kill_costs_only_the_save_that_it_hits(folder):
    """The old checkpoint and rows appended before are there, the rest is removed, no lock is in the way."""
    def child():
        other = RunFolder(folder.path, resume=True)
        other.append("metrics.jsonl", {"step": 0})
        save(other, 2, write_model=kill_me)

    save(folder, 1)
    folder.close()
    assert in_child(child) == -signal.SIGKILL
    assert names(folder.path) == ["checkpoint-1", "checkpoint-2.tmp", "metrics.jsonl", "run.json"]
    RunFolder(folder.path, resume=True).close()
    assert names(folder.path) == ["checkpoint-1", "metrics.jsonl", "run.json"]
    assert (folder.path / "metrics.jsonl").read_text() == '{"step": 0}\n'


def test_killed_at_any_line_what_is_replaced_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    """run.json, then the only checkpoint there is. Killed after 0 lines of checkpoint.py, 1, 2, ... until it
    gets through, the child leaves a folder that resumes, with each of the two wholly old or wholly new."""
    def replace():
        folder.write_json("run.json", {"age": "new"})
        save(folder, 1, record="new", keep=1)

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # only a power loss would make a difference
    folder = RunFolder(tmp_path / "template")
    folder.write_json("run.json", {"age": "old"})
    save(folder, 1, record="old")
    folder.close()
    seen = []
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        path = shutil.copytree(tmp_path / "template", tmp_path / f"{len(seen)}")
        folder = RunFolder(path, resume=True)
        code = killed_after(len(seen), replace)
        folder.close()
        folder = RunFolder(path, resume=True)
        assert folder.latest() == (path / "checkpoint-1", []) and not list(path.glob("checkpoint-*.tmp"))
        seen.append((folder.read_json("run.json")["age"], load(path / "checkpoint-1", bool)[1]))
        folder.close()
    in_turn = [pair for pair, _ in itertools.groupby(seen)]
    assert code == 0 and in_turn == [("old", "old"), ("new", "old"), ("new", "new")]


def test_every_byte_is_on_the_disk_before_the_name(folder, monkeypatch):
    """A power loss undoes what was not flushed: tensors are (by each rank, so at once), all other files, then
    trainer.json, its folder, the rename."""
    flushed = []
    fsync = os.fsync
    final = folder.path / "checkpoint-1"

    def note(descriptor):
        fsync(descriptor)
        flushed.append((os.fstat(descriptor).st_ino, final.exists()))

    monkeypatch.setattr(os, "fsync", note)
    save(folder, 1)
    places = {path.stat().st_ino: path.name for path in (folder.path, final, *final.iterdir())}
    order = [(places[inode], is_named) for inode, is_named in flushed]  # a rename keeps the inode
    assert order[0] == ("trainer-0-0.tensors", False)
    assert {name for name, _ in order[:-3]} == set(names(final)) - {"trainer.json"}
    assert order[-3:] == [("trainer.json", False), ("checkpoint-1", False), ("run", True)]


def test_a_failed_save_leaves_the_old_checkpoint_and_no_part_of_the_new_one(folder):
    """A full disk is an OSError that says so, for model, tensors and logs; other errors pass through."""
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.raises(OSError, match="checkpoint-2 could not be saved, older .* File too large"):
            save(folder, 2, write_model=lambda path: (path / "config.json").write_text("x" * 3000))
        with pytest.raises(OSError, match="checkpoint-2 could .*trainer-0-0.tensors .* File too large"):
            save(folder, 2, tensors={"moment": torch.zeros(1000)})
        with pytest.raises(OSError, match="File too large"):  # an error of the row that met it
            folder.append("metrics.jsonl", {"text": "x" * 3000})

    path = save(folder, 1)
    assert in_child(child) == 0
    with pytest.raises(ZeroDivisionError):
        save(folder, 2, write_model=lambda path: (write_model(path), 1 / 0))
    with pytest.raises(TypeError):
        save(folder, 2, record={"not JSON": object()})
    assert names(folder.path) == ["checkpoint-1", "metrics.jsonl", "run.json"]
    assert load(path, bool)[1] == {"step": 1}


@pytest.mark.parametrize("name, content", [
    ("trainer-0-0.tensors", b"cut"), ("model.safetensors", None), ("merges.txt", None),
    ("config.json", b"{ }"), *(("trainer.json", content) for content in (
        None, b'{"files": {"config.j', b"\xff\x00", b'{"epoch": 3}', b'{"files": 3, "sha256": 3}', b"[3]"))])
def test_a_damaged_newest_checkpoint_is_skipped_and_named(folder, name, content):
    """Truncated, half-copied, changed in size, foreign: resume takes the one before and names the file."""
    save(folder, 1)
    damaged = save(folder, 2)
    (damaged / name).unlink()
    if content is not None:
        (damaged / name).write_bytes(content)
    newest, (note,) = folder.latest()
    assert newest.name == "checkpoint-1"
    assert note.startswith("checkpoint-2 is damaged and was skipped: ") and str(damaged / name) in note
    with pytest.raises(ValueError, match=name):
        load(damaged, bool)


@pytest.mark.parametrize("name", ["trainer-0-0.tensors", "model.safetensors", "trainer.json"])
def test_a_flipped_bit_is_damage(folder, name):
    """Every file has the size of when it was saved, and still it is not what was saved."""
    save(folder, 1)
    path = save(folder, 2) / name
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    newest, (note,) = folder.latest()
    assert newest.name == "checkpoint-1" and "checkpoint-2 is damaged and was skipped: " in note
    assert name in note


def test_only_the_newest_checkpoints_stay(folder, monkeypatch):
    """By step, not by name or age. One that cannot be removed, being read over NFS, does not end the run."""
    for step in (1, 8, 9, 10):
        save(folder, step, keep=2)
    assert names(folder.path) == ["checkpoint-10", "checkpoint-9", "run.json"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *_, **__: os.stat("missing"))  # raises an OSError
        save(folder, 13, keep=1)
    assert len(names(folder.path)) == 4 and folder.latest() == (folder.path / "checkpoint-13", [])
    save(folder, 14, keep=1)
    assert names(folder.path) == ["checkpoint-14", "run.json"]


def test_damaged_later_checkpoints_do_not_push_out_sound_ones(folder):
    """After a fall-back from step 8 to 4, steps 5 and 6 stay; step 8 is replaced when the run gets there."""
    save(folder, 4)
    (save(folder, 8) / "trainer.json").unlink()
    for step in (5, 6):
        save(folder, step, keep=2)
    assert names(folder.path) == ["checkpoint-5", "checkpoint-6", "checkpoint-8", "run.json"]
    save(folder, 8, keep=2)
    assert folder.latest() == (folder.path / "checkpoint-8", [])


def test_too_little_space_is_noticed_before_the_first_byte(folder):
    """As many bytes as announced must be free: half of those that are, but not 6 EB."""
    folder.save(1, write_model, {}, num_bytes=shutil.disk_usage(folder.path).free // 2)
    with pytest.raises(OSError, match="checkpoint-2 could not be saved, .* needs 6,000,000,000,000 MB"):
        folder.save(2, lambda path: pytest.fail("began to write"), {}, num_bytes=6 * 10**18)
    assert names(folder.path) == ["checkpoint-1", "run.json"]


def test_a_refusal_says_what_to_type_and_leaves_the_folder_as_it_is(folder):
    """In use, a run without a word on what to do with it, none to resume, not ours to remove, unwritable."""
    path = save(folder, 500)
    for keywords in ({}, {"resume": True}, {"overwrite": True}):
        assert f"{folder.path} is in use by another process" in refusal(folder.path, **keywords)
    folder.close()
    for keywords in ({}, {"resume": True, "overwrite": True}):
        text = f"{folder.path} already holds a run: .*resume.*overwrite.*output"
        assert re.search(text, refusal(folder.path, **keywords))
    (folder.path / "run.json").unlink()
    assert "already holds a run" in refusal(folder.path)
    (path / "config.json").unlink()
    assert "checkpoint-500 is damaged and was skipped: " in refusal(folder.path, resume=True)
    (path / "trainer.json").unlink()  # as in the checkpoint-500 of many another trainer
    assert "checkpoint-500 is not of a run of ours" in refusal(folder.path, overwrite=True)
    assert names(folder.path) == ["checkpoint-500"] and len(names(path)) == 3
    assert "no complete checkpoint to resume from" in refusal(folder.path / "new", resume=True)
    for unwritable in (path / "merges.txt", path / "merges.txt" / "below", Path("/proc")):  # also to root
        assert f"{unwritable} is no folder that can be written, take another" in refusal(unwritable)


def test_overwrite_removes_what_a_run_writes_and_nothing_else(folder):
    """Notes, foreign folders and files with similar names survive; checkpoints, logs and left-overs go."""
    save(folder, 1)
    for name in ("metrics.jsonl", "samples.jsonl", "probes.jsonl"):
        folder.append(name, {"step": 1})
    folder.close()
    for name in ("notes.txt", "metrics.jsonl.bak", "checkpoint-best.txt"):
        (folder.path / name).write_text("mine")
    for name in ("checkpoint-2.tmp", "checkpoint-best", "plots"):
        (folder.path / name).mkdir()
    RunFolder(folder.path, overwrite=True).close()
    assert names(folder.path) == [
        "checkpoint-best", "checkpoint-best.txt", "metrics.jsonl.bak", "notes.txt", "plots"]


@pytest.mark.parametrize("name, make", [
    ("checkpoint-3", Path.touch), ("checkpoint-3.tmp", Path.touch), ("metrics.jsonl", Path.mkdir),
    ("run.json.tmp", Path.mkdir), ("samples.jsonl", os.mkfifo),
    ("checkpoint-3", lambda path: path.symlink_to(path.parent / "checkpoint-1"))])
def test_what_is_in_the_way_is_named_before_anything_is_removed(folder, name, make):
    """Or a later save would fail, or --overwrite end half-way."""
    save(folder, 1)
    folder.close()
    make(folder.path / name)
    before = names(folder.path)
    for keywords in ({"resume": True}, {"overwrite": True}):
        assert f"{folder.path / name} is in the way" in refusal(folder.path, **keywords)
    assert names(folder.path) == before


def test_logs_are_plain_json(folder):
    """NaN and infinities are null at any depth; text stays readable; half a surrogate pair stays JSON."""
    row = {"loss": NAN, "nested": [{"kl": math.inf}, (-math.inf, 0.1)], "text": "数\u2028\n\ud83d"}
    folder.append("metrics.jsonl", row)
    folder.write_json("run.json", row)
    for name in ("metrics.jsonl", "run.json"):
        text = (folder.path / name).read_text(encoding="utf-8")
        found = json.loads(text, parse_constant=pytest.fail)
        assert found == {**row, "loss": None, "nested": [{"kl": None}, [None, 0.1]]} and "数" in text
    assert (folder.path / "metrics.jsonl").read_bytes().count(b"\n") == 1
    assert folder.read_json("run.json") == found
    os.truncate(folder.path / "run.json", 9)
    for name in ("run.json", "missing.json"):
        with pytest.raises(ValueError, match=f"{name} is missing or damaged"):
            folder.read_json(name)


@pytest.mark.parametrize("end, kept", [
    (b"", b""), (b'{"step": 3}\n', b""), (b'{"step": 3, "lo', b""), (b'{"text": "\xe6\x95', b""),
    (b"\x00\x00", b""), (b'{"step": 2}', b'{"step": 2}\n')])
def test_truncate_leaves_the_rows_up_to_a_step(folder, end, kept):
    """Later rows and a line that a crash cut go; one that lacks its line feed gets it."""
    whole = b'{"step": 1, "a": 0.10}\n{"note": "no step"}\n{"step":2}\n{"step": 2, "text": "\xe2\x80\xa8"}\n'
    path = folder.path / "metrics.jsonl"
    path.write_bytes(b'{"step": 3}\n' + whole + end)
    folder.truncate("metrics.jsonl", 2)
    assert path.read_bytes() == whole + kept
    folder.append("metrics.jsonl", {"step": 3})
    assert path.read_bytes() == whole + kept + b'{"step": 3}\n'
    folder.truncate("samples.jsonl", 5)
    assert names(folder.path) == ["metrics.jsonl", "run.json"]
