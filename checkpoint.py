"""A run's folder: checkpoints that outlive a kill, a full disk and a bad copy; metrics without duplicates.

    run.json, metrics.jsonl, samples.jsonl
    checkpoint-40/            a Hugging Face folder that loads as it is, and beside the model
        trainer.tensors         the optimizer's master weights and moments, in safetensors format
        trainer.json            everything else, and the size of every file; written last
    .lock                     locked while a process writes here

A save fills checkpoint-40.tmp, waits for the disk (fsync), writes trainer.json and renames the folder. Killed
at any moment, it leaves older checkpoints alone, and whoever opens the run next finishes the job: a .tmp folder
that has its trainer.json is complete and gets its name, any other is removed.
"""
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

LOGS = ("run.json", "metrics.jsonl", "samples.jsonl")
RECORD = "trainer.json"
TENSORS = "trainer.tensors"  # not .safetensors: vLLM and SGLang load every such file of a folder as weights


class RunFolder:
    """The folder that a run writes: run.json, metrics.jsonl, samples.jsonl, checkpoint-N/."""

    def __init__(self, path, resume=False, overwrite=False):
        """Create or open `path` and lock it; ValueError when it is in use, not writable, or holds a run.

        `resume` opens a run that left a complete checkpoint; `overwrite` removes what a run wrote, no more.
        """
        self.path = Path(path)
        self._lock = lock(self.path)
        try:
            self._admit(resume, overwrite)
        except BaseException:
            self.close()
            raise

    def write_json(self, name, obj):
        """Replace the file `name` by `obj` as JSON, all at once; NaN and infinities become null."""
        write_whole(self.path / name, to_json(obj, indent=2))

    def read_json(self, name):
        """The content of the JSON file `name`; ValueError when it is missing or damaged."""
        return read_json(self.path / name)

    def append(self, name, row):
        """Add `row` to the file `name` as one line of JSON, NaN as null; OSError when the disk is full."""
        with open(self.path / name, "ab") as file:  # closed at once: a disk may say only then that it is full
            file.write(to_json(row))

    def truncate(self, name, last_step):
        """Drop the lines of the file `name` with a "step" above `last_step`, and one that a crash cut short."""
        path, kept = self.path / name, []
        if not path.exists():
            return
        for line in path.read_bytes().split(b"\n"):
            try:
                if json.loads(line).get("step", last_step) <= last_step:
                    kept.append(line + b"\n")
            except ValueError:
                pass  # cut short, or the nothing behind the last line feed
        write_whole(path, b"".join(kept))

    def save(self, step, write_model, tensors, meta, keep=2):
        """Write checkpoint-{step}, return its path; then only the newest `keep` checkpoints stay (0: all).

        `write_model(folder)` writes the model's files; `load` gives `tensors` and the JSON-able `meta` back.
        OSError when it fails, for lack of space for instance; the checkpoints before it stay intact.
        """
        final, unnamed = self.path / f"checkpoint-{step}", self.path / f"checkpoint-{step}.tmp"
        try:
            # Beside `tensors` comes the model, which is no larger than either of Adam's two float32 moments.
            needed = 1.5 * sum(tensor.nbytes for tensor in tensors.values())
            free = shutil.disk_usage(self.path).free
            if free < needed:
                raise OSError(f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
            unnamed.mkdir()
            write_model(unnamed)
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                      unnamed / TENSORS, metadata={"format": "pt"})
            seal(unnamed, meta)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{final} could not be saved, older checkpoints are intact: {error}") from error
        finally:
            self._settle()
        # A resumed run may have fallen back behind damaged ones: counting those, sound ones would have to go.
        older = [folder for number, folder in self._checkpoints() if number <= step]
        for folder in older[keep or len(older):]:
            shutil.rmtree(folder, ignore_errors=True)  # no reason to end a run, and the next save tries again
        return final

    def latest(self):
        """The newest complete checkpoint (or None), and a line of text for each newer one, all incomplete."""
        skipped = []
        for _, folder in self._checkpoints():
            try:
                read_record(folder)
                return folder, skipped
            except ValueError as error:
                skipped.append(f"{folder.name} is incomplete and was skipped: {error}")
        return None, skipped

    def close(self):
        """Release the lock, so that another process may open the folder."""
        self._lock.close()

    def _admit(self, resume, overwrite):
        """Refuse to mix two runs; otherwise leave the folder ready for this one."""
        holds_run = (self.path / "run.json").exists() or any(self.path.glob("checkpoint-*"))
        if holds_run and resume == overwrite:
            raise ValueError(f"{self.path} already holds a run: give either --resume to continue it, "
                             "or --overwrite to replace it, or another --output")
        self._settle()
        newest, skipped = self.latest()
        if resume and newest is None:
            raise ValueError("; ".join([f"{self.path} holds no complete checkpoint to resume from: start without "
                                        "--resume, or with --overwrite in its place", *skipped]))
        if overwrite:
            folders = [folder for _, folder in self._checkpoints()]
            for folder in folders:
                if not (folder / RECORD).exists():  # other trainers name their folders checkpoint-N, too
                    raise ValueError(f"{folder} is not of a run of ours: remove it, or give another --output")
            for folder in folders:
                shutil.rmtree(folder)
            for name in LOGS:
                (self.path / name).unlink(missing_ok=True)

    def _checkpoints(self):
        """(step, folder) of every checkpoint, the newest first."""
        steps = [(path.name.removeprefix("checkpoint-"), path) for path in self.path.glob("checkpoint-*")]
        return sorted(((int(step), path) for step, path in steps if step.isdecimal()), reverse=True)

    def _settle(self):
        """Name a .tmp folder that is complete, remove one that is not: how every save ends, finished or not."""
        for folder in list(self.path.glob("checkpoint-[0-9]*.tmp")):
            try:
                read_record(folder)
            except ValueError:
                shutil.rmtree(folder)
                continue
            final = folder.with_suffix("")
            if final.exists():  # no folder can be renamed onto another; killed in between, .tmp is still here
                shutil.rmtree(final)
            folder.rename(final)
            flush_to_disk(self.path)


def load(folder):
    """The tensors and the meta data that a checkpoint was saved with; ValueError names a damaged file."""
    folder = Path(folder)
    record = read_record(folder)
    try:
        # load_file maps the file into memory; copies outlive the checkpoint, which a later save removes.
        return {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}, record["meta"]
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is damaged ({error}): remove {folder} to resume from an older one")


def optimizer_tensors(optimizer, numbers):
    """{name: tensor} of what an optimizer must remember: its parameters (the masters), and Adam's moments.

    numbers: which of the model's parameters these are, in the optimizer's order; names are "NUMBER.master" and so on.
    """
    tensors = {f"{number}.master": parameter for number, parameter in zip(numbers, parameters_of(optimizer))}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{numbers[i]}.{name}": tensor for name, tensor in state.items()}
    return tensors


@torch.no_grad()
def restore_optimizer(optimizer, tensors, numbers):
    """Put what `optimizer_tensors` gave, of these parameters at least, back into an optimizer; else ValueError."""
    states = {number: {} for number in numbers}
    for name, tensor in tensors.items():
        number, key = name.split(".")
        if int(number) in states:
            states[int(number)][key] = tensor
    masters = [state.pop("master", torch.empty(0)) for state in states.values()]
    if [master.shape for master in masters] != [parameter.shape for parameter in parameters_of(optimizer)]:
        raise ValueError("the optimizer state of this checkpoint belongs to a model of other shapes")
    for parameter, master in zip(parameters_of(optimizer), masters):
        parameter.copy_(master)
    # load_state_dict moves each tensor to where the optimizer wants it; learning rates stay as they are.
    state = {i: state for i, state in enumerate(states.values()) if state}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def parameters_of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def lock(path):
    """Create the folder and return its open, locked .lock, which the system unlocks when the process ends."""
    import fcntl  # POSIX only; imported here so that Windows can import this file
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # a read-only folder is an error now, not at the first save
        file = open(path / ".lock", "ab")
    except OSError as error:
        raise ValueError(f"{path} is no folder that can be written ({error}): give another --output") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{path} is in use by another process: wait, or give another --output") from None
    except OSError:
        pass  # a file system without locks, as some clusters mount: better unlocked than no training at all
    return file


def seal(folder, meta):
    """Put every file of a checkpoint on the disk, and last the record that vouches for them."""
    # safetensors writes 0600, unreadable for a serving user; the folder's mode shows what the umask allows.
    mode, sizes = folder.stat().st_mode & 0o666, {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        path.chmod(mode)
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
        flush_to_disk(path)
    # Python's JSON keeps NaN here, unlike in the logs: what was saved is what is resumed.
    write_whole(folder / RECORD, json.dumps({"sizes": sizes, "meta": meta}).encode())


def read_record(folder):
    """trainer.json of a checkpoint; ValueError names the first file whose size is not the one listed there."""
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or not record.keys() >= {"sizes", "meta"}:
        raise ValueError(f"{folder / RECORD} is not the record of a checkpoint")
    for name, size in record["sizes"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else "none"
        if found != size:
            raise ValueError(f"{folder / name} has {found} of {size} bytes")
    return record


def read_json(path):
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise ValueError(f"{path} is missing or damaged") from None


def to_json(obj, indent=None):
    """JSON as bytes, with null for NaN and infinities, words that Python adds and other readers choke on."""
    obj = json.loads(json.dumps(obj), parse_constant=lambda name: None)
    # Half a surrogate pair has no UTF-8: backslashreplace writes \ud83d, JSON's own escape for it.
    return (json.dumps(obj, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_whole(path, data):
    """Replace a file so that whoever looks, even after a crash, finds the old bytes or the new ones."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    flush_to_disk(temporary)
    temporary.replace(path)
    flush_to_disk(path.parent)


def flush_to_disk(path):
    """fsync a file or folder: a rename may otherwise reach the disk before the bytes that it stands for."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
