"""Owns the examination of a whole data set, in several processes, behind a progress bar."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.examining.examine import Examiner, Finding
from dataset.examining.faults import FaultBook
from dataset.examining.leakage import Leakage, find_leakage
from dataset.examining.sources import Sources
from dataset.examining.tally import Tally, summarise

BATCH = 32  # records that a worker examines at a time


@dataclass
class Examined:
    """A data set with what was found in it."""

    examiner: Examiner
    tally: Tally
    faults: FaultBook
    is_faulty: bytearray  # by record

    @property
    def sources(self) -> Sources:
        return self.examiner.sources


def findings(examiner: Examiner, *, num_workers: int, what: str) -> Iterator[Finding]:
    """The findings of all records, in order, behind a progress bar."""
    loader: Any = DataLoader(
        examiner, batch_size=BATCH, num_workers=num_workers, collate_fn=list, shuffle=False
    )
    with tqdm(total=len(examiner), desc=what, unit=" records", disable=None) as bar:
        for batch in loader:
            yield from batch
            bar.update(len(batch))


def examine(examiner: Examiner, *, num_workers: int, what: str) -> Examined:
    """Examine all records of a data set."""
    found = Examined(examiner, Tally(), FaultBook(), bytearray(len(examiner)))
    for fault in examiner.sources.faults:
        found.faults.add(fault)
    for finding in findings(examiner, num_workers=num_workers, what=what):
        if finding.fault is None:
            found.tally.add(finding)
        else:
            found.faults.add(finding.fault)
            found.is_faulty[finding.index] = True
    return found


def compare(found: Examined, held_out: Examined, *, num_pairs: int) -> Leakage:
    """What a data set shares with one that is held out; adds it to the faults."""
    leakage = find_leakage(
        found.tally, found.sources, held_out.tally, held_out.sources, num_pairs=num_pairs
    )
    for index, fault in leakage.faults.items():
        found.faults.add(fault)
        found.is_faulty[index] = True
    return leakage


def figures_of(found: Examined, *, batch_size: int) -> dict[str, Any]:
    """The figures of the report."""
    return {
        "files": [str(path) for path in found.sources.named],
        "num_faulty": len(found.sources) - len(found.tally),
        "blank_lines": found.sources.num_blank,
        **summarise(found.tally, max_length=found.examiner.max_length, batch_size=batch_size),
    }
