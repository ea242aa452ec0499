"""If this fails, `--gradient_checkpointing` changes what is learnt, or saves no memory."""

import pytest
import torch
from support.rank_group import run_ranks, run_sft
from support.scripts import train_flags
from support.tiny_parts import make_records

from trainer import train_pretrain_vlm, train_sft_vlm
from trainer.run import setup
from trainer.trainer_utils import setup_seed

TRAINED = {"freeze_llm": 0, "dropout": 0.1, "num_hidden_layers": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_records(tmp_path_factory.mktemp("records"), num_records=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        TRAINED | {"dtype": "bfloat16"},
        TRAINED | {"use_moe": 1},
        {"freeze_llm": 1},  # nothing but the projection has a gradient
    ],
    ids=["dense", "moe", "projection"],
)
def test_results_have_equal_bits(flags, assets, data, tmp_path):
    found = []
    for number in (0, 1):
        out = tmp_path / str(number)
        argv = train_flags(assets, out, *data, gradient_checkpointing=number, **flags)
        assert train_pretrain_vlm.main(argv) == 0
        found.append(torch.load(next((out / "out").glob("*.pth")), weights_only=True))
    before, after = found
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_less_is_kept_for_the_backward_pass(assets, data, tmp_path, monkeypatch):
    kept = []

    def watch(run):
        (batch,) = next(iter(run.batches(0, 0)))
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        run.engine.model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run.engine.model(**batch.inputs)
        kept.append(total)
        return True

    monkeypatch.setattr(setup, "train", watch)
    for number in (0, 1):
        setup_seed(0)
        argv = train_flags(
            assets, tmp_path / str(number), *data, gradient_checkpointing=number, **TRAINED
        )
        train_sft_vlm.main(argv)
    assert kept[1] < kept[0] / 2


@pytest.mark.slow
def test_two_ranks_agree_with_one(assets, data, tmp_path):
    found = []
    for number, ranks in ((0, 1), (1, 2)):
        out = tmp_path / str(number)
        flags = TRAINED | {"dropout": 0.0, "batch_size": 4 // ranks, "learning_rate": 1e-3}
        argv = train_flags(assets, out, *data, gradient_checkpointing=number, **flags)
        run_ranks(argv, tmp_path, world_size=ranks, name=str(number), hook=(run_sft, argv))
        found.append(torch.load(next((out / "out").glob("*.pth")), weights_only=True))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=2e-3, rtol=0)
