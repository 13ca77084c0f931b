"""Two processes over gloo that stay up from test to test, for tests of what many ranks do; every wait has an end."""

import datetime
import pickle
import time
import traceback
import uuid
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from support.preloaded import START, fork_server

SECONDS = 300  # for one case on all ranks; one takes a second or two where cores are free
PATIENCE = 20  # for the others, once a rank has failed


def serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    """What each process does: run what is sent, send back whether it worked and what came of it."""
    torch.set_num_threads(1 + rank)  # ranks that split their sums differently
    longest = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=longest)
    while True:
        case, arguments = pickle.loads(pipe.recv_bytes())
        try:
            torch.manual_seed(0)
            answer = True, case(rank, *arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


class Ranks:
    """Runs a function of a module, ``case(rank, *arguments)``, on all ranks at once."""

    def __init__(self, folder, count=2):
        self.folder, self.count = folder, count
        self.processes, self.pipes = [], []

    def run(self, case, *arguments):
        """What each rank returned; ``AssertionError`` with the traceback of one that failed, or that never answered."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((case, arguments)))
        answers = [(False, f"no answer from {case.__name__}{arguments}")] * self.count
        waiting, end = dict(zip(self.pipes, range(self.count), strict=True)), time.monotonic() + SECONDS
        while waiting and (ready := wait(waiting, timeout=end - time.monotonic())):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    answers[rank] = False, f"the process died in {case.__name__}{arguments}"
                if not answers[rank][0]:
                    end = min(end, time.monotonic() + PATIENCE)
        wrong = [f"rank {rank}:\n{what}" for rank, (fine, what) in enumerate(answers) if not fine]
        if wrong:
            self.stop()  # the ranks may be at different collectives
            raise AssertionError("\n".join(wrong))
        return [what for _, what in answers]

    def start(self):
        fork_server()
        context, store = mp.get_context(START), str(self.folder / uuid.uuid4().hex)
        for rank in range(self.count):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, self.count, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(mine)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []
