"""Owns the process that talks to a tracker: SwanLab, Weights & Biases or TensorBoard.

`tracking.py` starts it. It reads JSON lines: first what to open, then figures, at last how the run
ended; if they end without that, the run was killed. What goes wrong is said once, on stderr.
"""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

TITLES = {"swanlab": "SwanLab", "wandb": "Weights & Biases", "tensorboard": "TensorBoard"}
SAID = 3  # exit status: failed, and the user has been told
LAST_WORDS_S = 60  # what a killed run's tracker has to finish
WAYS = {
    "swanlab": "run `swanlab login`, or choose --tracker_mode offline",
    "wandb": "run `wandb login`, or choose --tracker_mode offline",
    "tensorboard": "see whether its folder can be written",
}


class SwanLab:
    """Online, a resumed run is the same experiment; elsewhere its name tells."""

    def __init__(self, about: dict):
        import swanlab

        mode = about["mode"] or os.environ.get("SWANLAB_MODE") or "online"
        name, config, step = about["name"], about["config"], about["resumed_step"]
        options = {"id": about["id"], "resume": "allow"}
        if step is not None and mode != "online":
            name, options = f"{name} (from step {step})", {}
            config = config | {"resumed_from": about["id"]}
        settings = swanlab.Settings(interactive=False)
        swanlab.init(
            project=about["project"],
            name=name,
            config=config,
            mode=mode,
            settings=settings,
            **options,
        )
        self._swanlab = swanlab

    def write(self, figures: dict) -> None:
        self._swanlab.log(figures, step=int(figures["step"]))

    def close(self, outcome: str) -> None:
        error = {"error": "the training process ended"} if outcome == "crashed" else {}
        self._swanlab.finish(state=outcome, **error)


class WeightsAndBiases:
    """The same id is the same run, at once or once `wandb sync` has sent it."""

    def __init__(self, about: dict):
        import wandb

        mode = "offline" if about["mode"] == "local" else about["mode"]
        self._run = wandb.init(
            project=about["project"],
            name=about["name"],
            config=about["config"],
            mode=mode,
            id=about["id"],
            resume="allow",
            settings=wandb.Settings(console="off"),
        )

    def write(self, figures: dict) -> None:
        self._run.log(figures, step=int(figures["step"]))

    def close(self, outcome: str) -> None:
        self._run.finish(exit_code=int(outcome != "success"))


class TensorBoard:
    """Files in a folder of the run's own, whatever the mode; a resumed run goes on in it."""

    def __init__(self, about: dict):
        self._writer = None
        if about["mode"] == "disabled":
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(about["folder"]) / f"{about['name']}-{about['id'][:6]}"
        step = about["resumed_step"]
        purge = {} if step is None else {"purge_step": step + 1}
        self._writer = SummaryWriter(str(folder), **purge)
        self._writer.add_text("arguments", json.dumps(about["config"], indent=1), step or 0)
        print(f"tensorboard --logdir {folder.parent}", flush=True)

    def write(self, figures: dict) -> None:
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, int(figures["step"]))
            self._writer.flush()

    def close(self, outcome: str) -> None:
        if self._writer is not None:
            self._writer.close()


KINDS = {"swanlab": SwanLab, "wandb": WeightsAndBiases, "tensorboard": TensorBoard}


def messages() -> Iterator[dict]:
    """What training says, and after its last word {"end": ...}.

    A thread reads, so that the end is noticed even while a tracker waits for the network: no
    process is left behind for long.
    """
    received: queue.SimpleQueue[dict] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            received.put(json.loads(line))
        received.put({"end": "crashed"})
        watch = threading.Timer(LAST_WORDS_S, os._exit, (SAID,))
        watch.daemon = True
        watch.start()

    threading.Thread(target=read, daemon=True).start()
    while True:
        message = received.get()
        yield message
        if "end" in message:
            return


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # training is told, and tells this process
    stream = messages()
    about = next(stream)
    if "tracker" not in about:
        return 0
    title = TITLES[about["tracker"]]
    tracker = None
    try:
        tracker = KINDS[about["tracker"]](about)
        for message in stream:
            if "end" in message:
                tracker.close(message["end"])
            else:
                tracker.write(message["figures"])
    except BaseException as error:  # trackers also leave by SystemExit
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        failed = "did not start" if tracker is None else "failed"
        way = f"; {WAYS[about['tracker']]}" if tracker is None else ""
        print(
            f"warning: {title} {failed} and is left out from here on: {reason}{way} (the metrics "
            "file beside the weight goes on)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(SAID)  # not through exit handlers, which may wait for the network
    return 0


if __name__ == "__main__":
    sys.exit(main())
