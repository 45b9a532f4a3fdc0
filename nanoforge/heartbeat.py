"""A rank that is lost ends the others within half a minute, with a line that names it.

    heartbeat = Heartbeat(rank, world_size, token)      # on every rank, once they have met
    heartbeat.stop()                                    # before the first of them leaves

Where a process ends its connections close, and the others see it at their next exchange. They do not where
its machine is cut off or loses power, as gloo then waits for half an hour, nor while they compute for minutes
on their own. So a thread of each rank counts up a number in the store through which the ranks met, and reads
that of the next rank.
"""
import os
import threading

import torch.distributed as dist

from nanoforge.errors import print_error

BEAT = 2.0          # seconds between two looks
SILENCE = 12        # looks without a sign of life after which a rank is lost: Python may pause for seconds


class Heartbeat:
    """`token` is the same on all ranks and of no earlier start, whose numbers a store of torchrun's keeps."""

    def __init__(self, rank, world_size, token):
        self.rank, self.next_rank, self.token = rank, (rank + 1) % world_size, token
        self.silent_looks, self.stopped = 0, threading.Event()
        for work in (self._beat, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def stop(self):
        self.stopped.set()

    def _beat(self):
        mine, its, lost = (f'heartbeat/{self.token}/{key}' for key in (self.rank, self.next_rank, 'lost'))
        store, count, before = None, 0, None
        while not self.stopped.wait(BEAT):
            try:
                store = store or dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']),
                                               is_master=False, wait_for_workers=False)
                count += 1
                store.set(mine, str(count))
                if store.check([lost]):
                    self._end(store.get(lost).decode())
                now = store.get(its) if store.check([its]) else before
                if now != before:
                    self.silent_looks, before = 0, now
                elif self.silent_looks >= SILENCE:
                    store.set(lost, str(self.next_rank))        # for those who watch others
                    self._end(self.next_rank)
            except RuntimeError:
                store = None        # a short break of the network; of a long one _watch makes an end

    def _watch(self):
        """Counts looks, not seconds: after Ctrl-Z and fg nobody has been silent for long."""
        while not self.stopped.wait(BEAT):
            self.silent_looks += 1
            if self.silent_looks > SILENCE:         # _beat, which looks as often, waits for the store
                self._end(0)

    def _end(self, lost):
        if not self.stopped.is_set():
            print_error(f'rank {lost} of this run gives no sign of life: its process hangs, or its machine '
                        'is down or cut off; the others end, and --resume goes on from the last checkpoint')
            os._exit(2)             # the main thread may wait for that rank, for ever
