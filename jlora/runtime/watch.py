"""A thread that ends this process when another of the job has failed, or when the job makes no steps any more."""

import faulthandler
import json
import math
import sys
import threading
import time

from jlora.errors import HostLost, Stopped
from jlora.runtime import private_jax
from jlora.runtime.distributed import POLL_SECONDS, _leave, _me, end, process_index, several
from jlora.runtime.supervise import stands


class Watch(threading.Thread):
    """Ends this process when another has failed, or when no step is finished any more; idle in a job of one."""

    def __init__(self, step_timeout: int):
        """Begin to watch at the first beat.

        Args:
          step_timeout: seconds from one `beat` to the next that are too many; none before the first.
        """
        super().__init__(name="watch", daemon=True)
        self._step_timeout, self._step, self._beat = step_timeout, 0, math.inf
        if several():
            self.start()

    def beat(self, step: int) -> None:
        """The job is alive, and this many steps are done."""
        self._step, self._beat = step, time.monotonic()
        stands(f"after step {step}")
        if several():
            # Of the interpreter's C code, so that it works even where a thread never lets go of Python's lock.
            faulthandler.dump_traceback_later(self._step_timeout + 60, exit=True)

    def run(self) -> None:
        """The thread's loop."""
        import jax

        client = private_jax.job().client
        while True:
            time.sleep(POLL_SECONDS)
            try:
                client.key_value_set(f"jlora/step/{process_index()}", str(self._step), allow_overwrite=True)
                failures = client.key_value_dir_get("jlora/failed/")
                entries = client.key_value_dir_get("jlora/step/")
            except jax.errors.JaxRuntimeError:  # process 0 is gone, and JAX ends this process for it
                continue
            steps = {int(key.rpartition("/")[2]): int(step) for key, step in entries}
            if failures:
                key, text = failures[0]
                code, sentence = json.loads(text)
                if code == HostLost.exit_code:  # was it this one that it waited for?
                    faulthandler.dump_traceback(sys.stderr, all_threads=True)
                what = "" if code == Stopped.exit_code else "failed: "
                print(f"error: process {key.rpartition('/')[2]} of the job {what}{sentence}", file=sys.stderr)
                _leave(code)
            if time.monotonic() - self._beat > self._step_timeout:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                sentence = (
                    f"{_me()}: no step was finished for {self._step_timeout} s (distributed.step_timeout); "
                    f"{_stragglers(steps)}; where each thread stands is above; run the same command again to resume "
                    "from the last checkpoint"
                )
                print(f"error: {sentence}", file=sys.stderr)
                end(HostLost.exit_code, sentence)


def _stragglers(steps: dict[int, int]) -> str:
    least = min(steps.values())
    behind = [str(process) for process, step in sorted(steps.items()) if step == least]
    if len(behind) == len(steps):
        return f"all processes stand after step {least}"
    return f"process {', '.join(behind)} stands after step {least}, the others after step {max(steps.values())}"
