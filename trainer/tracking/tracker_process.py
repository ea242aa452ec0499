"""Owns the process that talks to a tracker: SwanLab, Weights & Biases or TensorBoard.

`trackers.py` starts it and writes JSON lines to its stdin:

1. the settings of the tracker;
2. `{"figures": {...}}`, one for each log line;
3. `{"end": OUTCOME}`. If the lines end without it, the run was killed.

An error is printed once, on stderr, and ends this process.
"""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TITLES = {"swanlab": "SwanLab", "wandb": "Weights & Biases", "tensorboard": "TensorBoard"}
REPORTED = 3  # exit status: failed, and the error has been printed
FINISH_S = 60  # the time that the tracker of a killed run has to finish
ADVICE = {  # for a tracker that does not start
    "swanlab": "run `swanlab login`, or choose --tracker_mode offline",
    "wandb": "run `wandb login`, or choose --tracker_mode offline",
    "tensorboard": "see whether its folder can be written",
}


class SwanLab:
    """Online, a resumed run is the same experiment; else a new one, named after its step."""

    def __init__(self, about: dict[str, Any]):
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

    def write(self, figures: dict[str, Any]) -> None:
        self._swanlab.log(figures, step=int(figures["step"]))

    def close(self, outcome: str) -> None:
        error = {"error": "the training process ended"} if outcome == "crashed" else {}
        self._swanlab.finish(state=outcome, **error)


class WeightsAndBiases:
    """A resumed run keeps its id, so it is the same run, online or after `wandb sync`."""

    def __init__(self, about: dict[str, Any]):
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

    def write(self, figures: dict[str, Any]) -> None:
        self._run.log(figures, step=int(figures["step"]))

    def close(self, outcome: str) -> None:
        self._run.finish(exit_code=int(outcome != "success"))


class TensorBoard:
    """Each run has its folder of event files; a resumed run goes on in the same one."""

    def __init__(self, about: dict[str, Any]):
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

    def write(self, figures: dict[str, Any]) -> None:
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, int(figures["step"]))
            self._writer.flush()

    def close(self, outcome: str) -> None:
        if self._writer is not None:
            self._writer.close()


KINDS = {"swanlab": SwanLab, "wandb": WeightsAndBiases, "tensorboard": TensorBoard}


def messages() -> Iterator[dict[str, Any]]:
    """The lines of training, parsed; the last is {"end": ...}, also if training was killed.

    A thread reads them, so that the end is noticed even while a tracker waits for the network and
    this process never outlives training for long.
    """
    received: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            received.put(json.loads(line))
        received.put({"end": "crashed"})
        watch = threading.Timer(FINISH_S, os._exit, (REPORTED,))
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
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # training gets the signal and sends the end
    stream = messages()
    about = next(stream)
    if "tracker" not in about:
        return 0
    title = TITLES[about["tracker"]]
    tracker: Any = None
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
        way = f"; {ADVICE[about['tracker']]}" if tracker is None else ""
        print(
            f"warning: {title} {failed} and is left out from here on: {reason}{way} (the metrics "
            "file beside the weight goes on)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(REPORTED)  # not through exit handlers, which may wait for the network
    return 0


if __name__ == "__main__":
    sys.exit(main())
