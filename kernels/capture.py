"""A decode step as a CUDA graph: one launch instead of hundreds, for each of which a CPU takes 5 us."""
import functools

import torch


@functools.cache
def _stream_and_pool(device):
    # One pool for all graphs, which take turns. A graph that is never deleted keeps it alive: torch 2.11
    # fails to capture into a pool whose graphs are gone, a torch.cuda.MemPool included.
    stream = torch.cuda.Stream(device)
    keeper = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        keeper.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=device)  # an empty graph would be warned of
        keeper.capture_end()
    return stream, keeper


def capture(step):
    """Run `step()` once, capture it once, and return a function that replays it on the current stream.

    That returns what the captured `step()` returned: always the same tensors, valid until the next replay of
    any captured step. What `step` reads and writes has to stay where it is. An error of `step` is passed on.
    """
    current = torch.cuda.current_stream()
    stream, keeper = _stream_and_pool(current.device)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        step()  # compiles kernels, and cuBLAS takes its workspace
        # torch.cuda.graph would give all cached memory back, which the next update wants again. A capture
        # cannot use it, though.
        if torch.cuda.mem_get_info(current.device)[0] < 2**30:
            torch.cuda.empty_cache()
        graph.capture_begin(pool=keeper.pool(), capture_error_mode="thread_local")
        try:
            out = step()
        finally:
            graph.capture_end()
    current.wait_stream(stream)

    def replay():
        graph.replay()
        return out
    return replay
