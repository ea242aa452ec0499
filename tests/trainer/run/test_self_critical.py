"""If this fails, self-critical training learns other answers than the model gives, rewards wrong
ones, or loses its place when it is stopped.
"""

import json

import pytest
import torch
from support.rank_group import run_main, run_ranks
from support.scripts import train_flags
from support.states import assert_same_state, leave_at, saved
from support.tiny_parts import COLOURS, conversation, make_records
from support.tiny_vlm import make_loaded, save_tiny

from dataset.collate import VLMCollator
from dataset.lm_dataset import IGNORE_INDEX, VLMDataset
from model.generation.engine import VLMEngine
from model.generation.sampling import Sampling
from trainer import train_scst_vlm
from trainer.run import self_critical
from trainer.run.rewards import BLEU_SHARE, END, read_rewards
from trainer.run.self_critical import SelfCritical

NUM_ANSWERS, ANSWER_WEIGHT, NUM_PICTURES = 3, 0.25, 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Three captions of each of eight pictures, and two questions without a picture."""
    data, images = make_records(tmp_path_factory.mktemp("data"), num_records=NUM_PICTURES + 1)
    names = sorted(path.name for path in images.iterdir())[:NUM_PICTURES]
    records = []
    for number, name in enumerate(names):
        colour = COLOURS[number % 4]
        for text in (f"A {colour} picture.", f"It is {colour}.", f"A plain {colour} ground."):
            records.append(conversation("<image>\nWhat is in the picture?", text, image=name))
    records += [conversation("What is a circle?", f"A red circle {n}.") for n in range(2)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return data, images


@pytest.fixture
def loaded(assets):
    return make_loaded(assets)


def make(loaded, captions, *, packs: bool = False, **fields):
    """An objective, and the data set's batch of some samples."""
    dataset = VLMDataset(*captions, loaded.processor, max_length=200)
    tokenizer = loaded.processor.tokenizer
    collate = VLMCollator(pad_token_id=tokenizer.pad_token_id, packs=packs)
    objective = SelfCritical(
        loaded.model,
        read_rewards(dataset),
        **{
            "collate": collate,
            "decode": lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            "end_id": tokenizer.eos_token_id,
            "num_answers": NUM_ANSWERS,
            "answer_weight": ANSWER_WEIGHT,
            "seed": 7,
            "dtype": "float32",
            "device": CPU,
        }
        | fields,
    )
    return objective, lambda numbers: collate([dataset[i] for i in numbers])


def rows_of(batch) -> list[tuple[list[int], list[int], float]]:
    """Ids, supervised ids and weight of each row."""
    inputs, found = batch.inputs, []
    width = inputs["labels"].shape[1]
    for row in range(len(inputs["labels"])):
        own = inputs["target_positions"] // width == row
        (weight,) = set(batch.target_weights[own].tolist())
        labels = inputs["labels"][row]
        ids = inputs["input_ids"][row, : inputs["attention_mask"][row].sum()]
        found.append((ids.tolist(), labels[labels != IGNORE_INDEX].tolist(), weight))
    return found


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_answers_are_those_that_the_engine_draws(packs, loaded, captions, monkeypatch):
    """Rows: the records as they are, then the answers of each to its first question."""
    seeds = {}
    draw = self_critical.draw_answers

    def noted(model, prompts, **options):
        seeds.update(options)
        return draw(model, prompts, **options)

    monkeypatch.setattr(self_critical, "draw_answers", noted)
    objective, batch_of = make(loaded, captions, packs=packs)
    numbers = [0, 4, 24, 9]
    batch = batch_of(numbers)
    made = objective(batch, 0)
    rows = rows_of(made)
    assert len(rows) == made.num_sequences == len(numbers) * (1 + NUM_ANSWERS)
    assert made.num_supervised == batch.num_supervised and made.num_samples == batch.num_samples
    assert made.sample_names == batch.sample_names
    engine = VLMEngine(loaded)
    dataset = VLMDataset(*captions, loaded.processor, max_length=200)
    plain = Sampling(temperature=1, top_p=1)
    for place, number in enumerate(numbers):
        record = dataset.records[number]
        assert rows[place][2] == ANSWER_WEIGHT
        pictures = [dataset.read_picture(image) for image in record.images]
        for k in range(NUM_ANSWERS):
            nth = place * NUM_ANSWERS + k
            own = Sampling(
                **(
                    vars(plain)
                    | {"seed": seeds["seeds"][nth], "max_new_tokens": seeds["limits"][nth]}
                )
            )
            (answer,) = engine.generate([(record.messages[:1], pictures)], own)
            ids, supervised, _ = rows[len(numbers) + nth]
            assert answer.num_new_tokens == len(supervised)
            half = "\ufffd"  # of a character that the limit has cut
            assert objective.decode(supervised).rstrip(half) == answer.text.rstrip(half)
            assert ids[-len(supervised) :] == supervised
            start = len(ids) - len(supervised)
            assert ids[:start] == rows[place][0][:start]  # the same prompt
    logits = loaded.model(**made.inputs_on(CPU)).logits
    assert logits.isfinite().all()


def test_weights_are_advantages(loaded, captions):
    objective, batch_of = make(loaded, captions)
    rows = rows_of(objective(batch_of([3, 11]), 0))
    rewards = read_rewards(VLMDataset(*captions, loaded.processor))
    wheres = [f"{captions[0].name}:{number + 1}" for number in (3, 11)]
    for place, where in enumerate(wheres):
        drawn = rows[2 + place * NUM_ANSWERS :][:NUM_ANSWERS]
        liked = [
            rewards.of(where, objective.decode(s).strip(), is_whole=s[-1] == objective.end_id)
            for _, s, _ in drawn
        ]
        for k, (_, _, weight) in enumerate(drawn):
            others = [value for i, value in enumerate(liked) if i != k]
            wanted = (liked[k] - sum(others) / len(others)) / NUM_ANSWERS
            assert weight == pytest.approx(wanted, abs=1e-5)
    assert objective.take_reward() is not None and objective.take_reward() is None


def test_what_is_drawn_depends_on_seed_epoch_and_sample_alone(loaded, captions):
    objective, batch_of = make(loaded, captions)

    def answers(numbers, epoch=0, own=objective):
        return [ids for ids, _, _ in rows_of(own(batch_of(numbers), epoch))[len(numbers) :]]

    together = answers([0, 1, 2, 3])
    assert together == answers([0, 1]) + answers([2, 3])
    assert together != answers([0, 1, 2, 3], epoch=1)
    assert together != answers([0, 1, 2, 3], own=make(loaded, captions, seed=8)[0])


def test_reward_prefers_what_people_said(loaded, captions):
    rewards = read_rewards(VLMDataset(*captions, loaded.processor))
    where = f"{captions[0].name}:1"
    right = rewards.of(where, "It is red.", is_whole=True)
    worse = [
        rewards.of(where, "It is red.", is_whole=False),
        rewards.of(where, "It is blue.", is_whole=True),
        rewards.of(where, "It is red. It is red. It is red.", is_whole=True),
        rewards.of(where, "", is_whole=True),
    ]
    assert all(right > 1.2 * other for other in worse)
    assert right > BLEU_SHARE * 0.99  # a reference itself
    assert not rewards.knows("elsewhere:1") and END.strip().isalpha()


def test_training_raises_the_reward_and_resumes_with_equal_bits(
    assets, captions, loaded, tmp_path, monkeypatch
):
    save_tiny(loaded, tmp_path / "start_32.pth")
    flags = {"from_weight": tmp_path / "start_32.pth", "learning_rate": 5e-3, "epochs": 4}
    flags |= {"batch_size": 13, "num_answers": 4, "save_interval": 3}

    def train(name, **more):
        return train_flags(assets, tmp_path / name, *captions, **flags, **more)

    assert train_scst_vlm.main(train("whole")) == 0
    lines = (tmp_path / "whole/out/scst_vlm_32_metrics.jsonl").read_text().splitlines()
    rewards = [line["reward"] for line in map(json.loads, lines) if "reward" in line]
    assert len(rewards) == 8 and sum(rewards[-2:]) > 1.5 * sum(rewards[:2])
    with monkeypatch.context() as patch:
        leave_at(patch, 5)
        assert train_scst_vlm.main(train("parts")) != 0
    assert train_scst_vlm.main(train("parts", from_resume=1)) == 0
    whole, parts = (saved(tmp_path / n / "checkpoints", "*_resume.pth") for n in ("whole", "parts"))
    assert_same_state(whole, parts)


@pytest.mark.slow
def test_two_ranks_take_the_step_of_one(assets, captions, loaded, tmp_path):
    save_tiny(loaded, tmp_path / "start_32.pth")
    weights = {}
    for world_size, batch_size in ((1, 26), (2, 13)):
        out = tmp_path / str(world_size)
        flags = {"from_weight": tmp_path / "start_32.pth", "learning_rate": 1e-3}
        argv = train_flags(assets, out, *captions, batch_size=batch_size, **flags)
        out.mkdir()
        hook = (run_main, train_scst_vlm.main, argv)
        run_ranks([], out, world_size=world_size, hook=hook)
        weights[world_size] = saved(out / "checkpoints", "*_resume.pth")["model"]
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[2][name], tensor, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"deepspeed": "ds_zero2.json"}, "--deepspeed: this stage draws answers"),
        ({"num_answers": 1}, "--num_answers 1 is too small; the least is 2"),
        ({"data_path": "hf://datasets/user/name/*.parquet"}, "another machine"),
        ({"data_path": "twice"}, "two records are called data_0.jsonl:1"),
        ({"data_path": "one.jsonl"}, "no language has answers about two of them"),
    ],
    ids=["deepspeed", "one answer", "stream", "same names", "one picture"],
)
def test_what_cannot_be_is_one_line(flags, says, assets, captions, loaded, tmp_path, capsys):
    save_tiny(loaded, tmp_path / "start_32.pth")
    if flags.get("data_path") == "one.jsonl":
        path = tmp_path / "one.jsonl"
        path.write_text(captions[0].read_text().splitlines()[0] + "\n")
        flags = {"data_path": path}
    if flags.get("data_path") == "twice":
        other = tmp_path / "other" / captions[0].name
        other.parent.mkdir()
        other.write_bytes(captions[0].read_bytes())
        flags = {"data_path": [captions[0], other]}
    argv = train_flags(assets, tmp_path / "out", *captions, from_weight=tmp_path / "start_32.pth")
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    if "data_path" in flags:
        place = argv.index("--data_path")
        del argv[place : place + 2]
    assert train_scst_vlm.main(argv) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and says in errors[0]
