"""How a run ends that cannot go on: in one line that says why, with its last finished step saved.

    with training(save_run):                  everything behind the first step
        with out_of_memory("--offload"):      what takes memory, and the flag that helps
            ...
"""
import contextlib
import traceback

import torch

# Where it is not known what memory was for.
ANY_MEMORY_FLAG = "a lower --sample-batch-size or --micro-batch-tokens, --recompute or --offload"


class RewardError(Exception):
    """A reward function that raised an error, or gave what is no number."""


class Ended(Exception):
    """A run that could not go on; the text says why, what to do, and what was saved."""


@contextlib.contextmanager
def training(save_run):
    """Whatever ends a run early costs no finished step: it is saved as it was after the last one, and the
    reason is one line; a bug's traceback, of ours or of a user's method, is in crash.txt."""
    try:
        yield
        return
    except BaseException as error:  # sys.exit() in a user's function, too
        failure = error
    # These say themselves what happened; of anything else the place is needed.
    is_bug = not isinstance(failure, (OSError, FloatingPointError, MemoryError, RewardError))
    if lacks_memory(failure):
        is_bug = False
        failure = MemoryError(out_of_memory_line(failure, ANY_MEMORY_FLAG))
    trace = "".join(traceback.format_exception(failure)) if is_bug else ""
    failure = failure.with_traceback(None)  # whose frames hold tensors: saving needs their memory
    reason = f"{failure!r}" if is_bug else f"{failure}"
    # Where numbers are not finite, what the last step left is broken already.
    is_sound = not isinstance(failure, FloatingPointError)
    saved = save_run(trace, is_sound).replace(f" ({reason})", "")  # of a save that failed again
    raise Ended(f"{reason}; {saved}") from failure


@contextlib.contextmanager
def out_of_memory(flags, where=""):
    """Turns the error of a device without memory into a MemoryError that says what to type."""
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise MemoryError(out_of_memory_line(error, flags, where)) from error.with_traceback(None)


def lacks_memory(error):
    """Whether it says that a device has no memory left; torch has no class for a host's."""
    is_host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in f"{error}"
    return is_host or isinstance(error, torch.OutOfMemoryError)


def out_of_memory_line(error, flags, where=""):
    """What went wrong, and what to type."""
    text = str(error).splitlines()[0]
    return f"out of memory{where}: give {flags}; --plan shows what takes how much ({text})"
