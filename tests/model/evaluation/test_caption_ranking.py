"""If this fails, captions are ranked by another likelihood than their own, or what a picture adds
is told against pictures that belong to a candidate.
"""

from types import SimpleNamespace

import pytest
import torch
from support.painted import eval_flags

import eval_vlm
from dataset.evaluation.eval_data import EvalData
from dataset.lm_dataset import VLMDataset
from model.evaluation.evaluator import Evaluator, labelled_sequence
from model.evaluation.likelihood import AnswerScore, score_candidates, score_sequences
from model.generation.engine import VLMEngine


@pytest.fixture(scope="module")
def engine(assets, painted) -> VLMEngine:
    return VLMEngine.from_args(eval_vlm.parse_args(eval_flags(assets, painted)))


def test_controls_of_a_caption_are_pictures_of_no_candidate(painted, engine):
    dataset = VLMDataset(painted / "captions.jsonl", painted / "images", engine.processor)
    data = EvalData(dataset, num_records=None, num_wrong=3, seed=0, window=40)
    by_caption = {}  # two pictures may have the same
    for card in data.cards:
        by_caption.setdefault(card.answers[0], set()).update(card.images)
    cases = [case for case in data.read_window(0).cases if case.candidates]
    for case in cases:
        texts = [engine.processor.tokenizer.decode(s.input_ids) for s in case.candidates]
        answers = [t.split("assistant\n")[1].split("<|im_end|>")[0] for t in texts]
        keys = {key for images in case.controls for key in images}
        assert keys and len(keys) == len(case.controls)
        assert not keys & {*case.card.images, *case.others}
        assert all(by_caption[answer] - keys for answer in answers)
    assert sum(len(case.controls) for case in cases) > 3 * len(cases)


class OnePrior:
    """Candidate losses as a table: (image, caption)."""

    def __init__(self, table):
        self.table = torch.tensor(table)

    def score_candidates(self, samples, features):
        rows = self.table[features.flatten().long()]
        return [[AnswerScore(False, float(x), 1) for x in row] for row in rows]


def test_a_caption_that_is_always_likely_gains_nothing():
    """The wrong caption is the likeliest whatever is shown; the picture lowers only the right."""
    card = SimpleNamespace(index=0, images=("own",), languages=("en",))
    case = SimpleNamespace(
        card=card, candidates=[1, 2], others=("other",), controls=[("one",), ("two",)]
    )
    names = ("own", "other", "one", "two")
    features = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    tables = {  # by whether the right caption is likeliest, and whether it gains most
        (False, True): [[2.0, 1.0], [5.0, 1.0], [4.0, 1.0], [5.0, 1.0]],
        (True, False): [[1.0, 2.0], [4.0, 1.0], [1.0, 3.0], [1.0, 4.0]],
        (True, True): [[1.0, 2.0], [5.0, 1.0], [4.0, 1.0], [5.0, 1.0]],
    }
    for (is_right, gains), table in tables.items():
        row = Evaluator._rank_caption(OnePrior(table), case, features)
        assert (row.is_right["right"], row.gains_most["right"]) == (is_right, gains)
        assert (row.is_right["shuffled"], row.gains_most["shuffled"]) == (False, False)
    # A picture that the caption is likely under counts more than the others: likelihoods, not their
    # logarithms, are averaged.
    table = [[3.0, 1.0], [5.0, 1.0], [2.0, 1.0], [10.0, 1.0]]
    assert not Evaluator._rank_caption(OnePrior(table), case, features).gains_most["right"]
    case.controls = []
    assert Evaluator._rank_caption(OnePrior(tables[True, True]), case, features).gains_most == {}


def test_candidates_with_a_shared_prompt_score_as_whole_conversations(painted, engine):
    dataset = VLMDataset(painted / "captions.jsonl", painted / "images", engine.processor)
    data = EvalData(dataset, num_records=None, num_wrong=3, seed=0, window=16)
    case = next(c for c in data.read_window(0).cases if c.candidates)
    with torch.no_grad():
        features = engine.model.encode_images(case.sample.pixel_values)
    other = data.read_window(0).pictures[case.others[0]][None]
    with torch.no_grad():
        shown = torch.stack([features, engine.model.encode_images(other)])
    texts = [labelled_sequence(sample, None) for sample in case.candidates]
    assert len(texts) > 1
    for images, scored in zip(shown, score_candidates(engine.model, texts, shown), strict=True):
        rows = [labelled_sequence(sample, images) for sample in case.candidates]
        whole = [scores[0] for scores in score_sequences(engine.model, rows, batch_size=2)]
        for one, expected in zip(scored, whole, strict=True):
            assert one.loss_sum == pytest.approx(expected.loss_sum, rel=1e-4)
            assert (one.num_tokens, one.is_right) == (expected.num_tokens, expected.is_right)
