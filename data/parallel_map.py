"""One function over many chunks of work, in order, in this process or in several."""
import concurrent.futures
import multiprocessing
from collections import deque


def map_chunks(function, chunks, num_proc=1):
    """Yields (chunk, function(chunk)) for an iterable of chunks, in order.

    With num_proc > 1 that many spawned processes work ahead, on no more than twice as many chunks: neither
    the chunks nor the results are ever in memory all at once. function must be picklable (a top-level one, or
    a partial of one).
    """
    if num_proc <= 1:
        for chunk in chunks:
            yield chunk, function(chunk)
        return
    spawn = multiprocessing.get_context('spawn')        # a fork of a process with threads may hang
    pool = concurrent.futures.ProcessPoolExecutor(num_proc, spawn)
    waiting = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(function, chunk)))
            if len(waiting) > 2 * num_proc:
                yield done(waiting)
        while waiting:
            yield done(waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def done(waiting):
    chunk, future = waiting.popleft()
    return chunk, future.result()
