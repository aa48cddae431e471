"""A run's folder: checkpoints that outlive a kill, a full disk and a bad copy; logs without duplicates.

    run.json, metrics.jsonl, samples.jsonl, probes.jsonl; eval.json and eval.jsonl of an evaluation
    checkpoint-40/            a Hugging Face folder that loads as it is, and beside the model
        trainer-0-0.tensors     the optimizer's masters and moments, in safetensors format: of rank 0, part 0
        trainer.json            everything else, and size and SHA-256 of every file; written last
    .lock                     locked while a process writes here

A save fills checkpoint-40.tmp, waits for the disk (fsync), writes trainer.json and renames the folder. Killed
at any moment, it leaves older checkpoints alone, and whoever opens the run next finishes the job: a .tmp
folder that has its trainer.json is complete and gets its name, any other is removed.
"""
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

LOGS = ("run.json", "crash.txt", "reward_failed.json", "metrics.jsonl", "samples.jsonl", "probes.jsonl",
        "eval.json", "eval.jsonl")
MANIFEST = "trainer.json"  # {"files": {file: [bytes, SHA-256]}, "record": what `save` was given, "sha256"}
PART_BYTES = 2 << 30       # of one file of tensors: 2 GiB


class RunFolder:
    """The folder that a run writes, created and locked. `resume` opens a run that left a complete checkpoint,
    `overwrite` removes what a run wrote, no more. ValueError if in use, not writable, or holding a run."""

    def __init__(self, path, resume=False, overwrite=False):
        self.path = Path(path)
        self._lock = lock(self.path)
        try:
            self._admit(resume, overwrite)
        except BaseException:
            self.close()  # a refused folder can be opened in another way at once
            raise

    def write_json(self, name, obj):
        """Replace the file `name` by `obj` as JSON, all at once; NaN and infinities become null."""
        write_whole(self.path / name, to_json(obj, indent=2))

    def read_json(self, name):
        """The object in the JSON file `name`; ValueError when it is missing or damaged."""
        try:
            return {**json.loads((self.path / name).read_bytes())}
        except (OSError, ValueError, TypeError, RecursionError):
            raise ValueError(f"{self.path / name} is missing or damaged") from None

    def append(self, name, row):
        """Add `row` to the file `name` as one line of JSON, NaN as null; OSError when the disk is full."""
        with open(self.path / name, "ab") as file:  # closed at once: a disk may say only then that it is full
            file.write(to_json(row))

    def truncate(self, name, last_step):
        """Drop the lines of the file `name` whose "step" is above `last_step`, and one that a crash cut."""
        path = self.path / name
        if not path.exists():
            return
        kept = []
        for line in path.read_bytes().split(b"\n"):
            try:
                if json.loads(line).get("step", last_step) <= last_step:
                    kept.append(line + b"\n")
            except (ValueError, TypeError, AttributeError, RecursionError):
                pass  # cut short, the nothing behind the last line feed, or no row of ours
        write_whole(path, b"".join(kept))

    def save(self, step, write, record, num_bytes, keep=2, best=None):
        """Write checkpoint-{step}, return its path; then only the newest `keep` checkpoints stay, and the one
        to which `best(step)`, a number or None, is highest.

        `write(folder)` writes the model and, by `write_tensors`, what every rank keeps, about `num_bytes`; it
        ends, by an error too, only when no rank writes any more. `load` gives `record`, JSON-able, back.
        OSError when it fails, for lack of space for instance; the checkpoints before it stay intact.
        """
        final = self.path / f"checkpoint-{step}"
        unnamed = self.path / f"checkpoint-{step}.tmp"
        try:
            self.need(num_bytes)
            unnamed.mkdir()
            write(unnamed)
            seal(unnamed, record)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{final} could not be saved, older checkpoints are intact: {error}") from error
        finally:
            settle(self.path)  # named if it is complete, removed if it is not
        # A resumed run may have fallen back behind damaged ones: counting those, sound ones would go.
        not_later = [(number, folder) for number, folder in self._checkpoints() if number <= step]
        ranked = [(best(number), folder) for number, folder in not_later if best and best(number) is not None]
        kept = [max(ranked)[1]] if ranked else []
        for _, folder in not_later[keep:]:
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)  # no reason to end a run: the next save tries again
        return final

    def need(self, num_bytes):
        """OSError if the disk has no room for so many bytes."""
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise OSError(f"{self.path}: a checkpoint needs {num_bytes / 1e6:,.0f} MB, {free / 1e6:,.0f} MB "
                          "are free on this disk")

    def latest(self):
        """(the newest sound checkpoint, all of which is read, or None; a line of text for each newer one)."""
        notes = []
        for _, folder in self._checkpoints():
            try:
                read_record(folder, thorough=True)
                return folder, notes
            except ValueError as error:
                notes.append(f"{folder.name} is damaged and was skipped: {error}")
        return None, notes

    def close(self):
        """Release the lock, so that another process may open the folder."""
        self._lock.close()

    def _admit(self, resume, overwrite):
        """Refuse to mix two runs; otherwise leave the folder ready for this one."""
        refuse_obstacles(self.path)  # before anything is removed
        holds_run = (self.path / "run.json").exists() or any(self.path.glob("checkpoint-*"))
        if holds_run and resume + overwrite != 1:  # neither, or both
            raise ValueError(f"{self.path} already holds a run: continue it (resume) or replace it "
                             "(overwrite), or take another folder (output)")
        settle(self.path)
        newest, notes = self.latest()
        if resume and newest is None:
            raise ValueError("; ".join([f"{self.path} holds no complete checkpoint to resume from: begin "
                                        "anew, with overwrite where it holds a run", *notes]))
        if overwrite:
            for _, folder in self._checkpoints():
                if not (folder / MANIFEST).exists():  # other trainers name their folders checkpoint-N, too
                    raise ValueError(f"{folder} is not of a run of ours: remove it, or take another folder")
            for _, folder in self._checkpoints():
                shutil.rmtree(folder)
            for name in LOGS:
                (self.path / name).unlink(missing_ok=True)

    def _checkpoints(self):
        """[(step, folder), ...] of every checkpoint, complete or not, the newest first."""
        folders = {path.name.removeprefix("checkpoint-"): path for path in self.path.glob("checkpoint-*")}
        return sorted(((int(step), path) for step, path in folders.items() if step.isdecimal()), reverse=True)


def write_tensors(folder, rank, tensors, part_bytes=PART_BYTES):
    """Write (name, tensor) pairs, of any device and layout, to trainer-{rank}-{part}.tensors in `folder`.

    A generator may make each when asked; it is held, and must not change, until its part, `part_bytes` or a
    little more, is on the disk. OSError when that fails. No pairs, no file.
    """
    pairs = iter(tensors)
    for number in itertools.count():
        # Parts, because safetensors wants all tensors of a file in host memory at once: 90 GB for masters and
        # moments of 7B. Not .safetensors: vLLM and SGLang load every such file of a folder as weights.
        file = folder / f"trainer-{rank}-{number}.tensors"
        part = {}
        for name, tensor in pairs:
            part[name] = tensor.detach().cpu().contiguous()
            if sum(held.nbytes for held in part.values()) >= part_bytes:
                break
        if not part:
            return
        try:
            save_file(part, file, metadata={"format": "pt"})
            flush_to_disk(file)  # here, too: no fsync of rank 0 reaches the cache of another machine
        except (OSError, SafetensorError) as error:
            raise OSError(f"{file.name} could not be written: {error}") from error
        del part, tensor  # before the next tensor is made


def load(folder, wanted):
    """({name: tensor}, record) of a checkpoint, by however many ranks it was written: the tensors for which
    `wanted(name)` is true, others are not read. ValueError names a damaged file."""
    record = read_record(Path(folder))
    tensors = {}
    for file in Path(folder).glob("trainer-*.tensors"):
        try:
            with safe_open(file, framework="pt") as part:
                # The file is mapped into memory; copies outlive the checkpoint, which a later save removes.
                tensors |= {name: part.get_tensor(name).clone() for name in part.keys() if wanted(name)}
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): remove {folder} to resume from an older one")
    return tensors, record


def lock(path):
    """Create the folder and return its open, locked .lock, which the system unlocks when the process ends.
    ValueError if it cannot be written, or is in use."""
    import fcntl  # POSIX only; imported here so that Windows can import this file
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # a read-only folder is an error now, not at the first save
        file = os.fdopen(os.open(path / ".lock", os.O_RDWR | os.O_CREAT), "ab")  # which waits for no pipe
    except (OSError, ValueError) as error:  # the latter for a name with a zero byte
        raise ValueError(f"{path} is no folder that can be written, take another (output): {error}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{path} is in use by another process: wait, or take another (output)") from None
    except OSError:
        pass  # a file system without locks, as some clusters mount: better unlocked than no training at all
    return file


def refuse_obstacles(folder):
    """ValueError for what has the name of a run's file or checkpoint and is none: a later save would fail."""
    for path in folder.iterdir():
        is_log = path.name.removesuffix(".tmp") in LOGS
        is_checkpoint = re.fullmatch(r"checkpoint-[0-9]+(\.tmp)?", path.name)
        is_folder = path.is_dir() and not path.is_symlink()
        if is_log and not path.is_file() or is_checkpoint and not is_folder:
            raise ValueError(f"{path} is in the way of a run's files: move or remove it")


def seal(folder, record):
    """Put every file of a checkpoint on the disk, and last the manifest that vouches for them."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        # safetensors writes 0600, unreadable for a serving user; the folder's mode shows what umask allows.
        path.chmod(folder.stat().st_mode & 0o666)
        flush_to_disk(path)
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest(path)]
    # Python's JSON keeps NaN here, unlike in the logs: what was saved is what is resumed.
    manifest = {"files": files, "record": record}
    write_whole(folder / MANIFEST, json.dumps(manifest | {"sha256": fingerprint(manifest)}).encode())


def settle(path):
    """Name a .tmp folder that is complete, remove one that is not: how every save ends, finished or not."""
    for folder in filter(Path.is_dir, list(path.glob("checkpoint-[0-9]*.tmp"))):
        try:
            read_record(folder)
        except ValueError:
            shutil.rmtree(folder)
            continue
        final = folder.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)  # in the rename's way; killed in between, .tmp is still here
        folder.rename(final)
        flush_to_disk(path)


def read_record(folder, thorough=False):
    """The record that `seal` was given; ValueError names the first file whose size, or where `thorough` whose
    content, is not that of then."""
    try:
        if not (folder / MANIFEST).is_file():  # a pipe would be waited for
            raise ValueError
        manifest = json.loads((folder / MANIFEST).read_bytes())
        is_ours = manifest.pop("sha256") == fingerprint(manifest)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        is_ours = False  # the last four: a trainer.json of someone else
    if not is_ours:
        raise ValueError(f"{folder / MANIFEST} is missing or damaged")
    for name, (size, sha256) in manifest["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else "none"
        if found != size:
            raise ValueError(f"{path} has {found} of {size} bytes")
        if thorough and digest(path) != sha256:
            raise ValueError(f"{path} is not what was saved: its SHA-256 differs")
    return manifest["record"]


def fingerprint(obj):
    """SHA-256 of an object as JSON."""
    return hashlib.sha256(json.dumps(obj).encode()).hexdigest()


def digest(path):
    """SHA-256 of a file's bytes, of which it takes 1 to 2 GB/s; ValueError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def to_json(obj, indent=None):
    """JSON as bytes, with null for NaN and infinities, words that Python adds and other readers choke on."""
    obj = json.loads(json.dumps(obj), parse_constant=lambda name: None)
    # Half a surrogate pair has no UTF-8: backslashreplace writes \ud83d, JSON's own escape for it.
    return (json.dumps(obj, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_whole(path, data):
    """Replace a file so that whoever looks, even after a crash, finds the old bytes or the new ones."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        flush_to_disk(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # half of it would take the room that was missing
        raise
    flush_to_disk(path.parent)


def flush_to_disk(path):
    """fsync a file or folder: a rename may otherwise reach the disk before the bytes that it stands for."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
