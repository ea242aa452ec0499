"""If this fails, the ONNX graphs compute something else than the weight."""

import numpy as np
import pytest
import torch
from support.exporting import NUM_IMAGES, export, make_kits, samples
from support.tiny_vlm import naive_greedy_ids, picture

from model.export import onnx_graphs
from model.export.__main__ import main, parse_args
from model.export.onnx_graphs import DECODER, EMBED, VISION, graphs
from model.export.source import load_source
from model.generation.engine import ask

QUESTION = "\nWhat is in the picture?"
TOLERANCE = 1e-4  # of logits
GENERATIONS = pytest.mark.parametrize("generation", ["2", "3"])


@pytest.fixture(scope="module")
def kits(assets, tmp_path_factory):
    return make_kits(tmp_path_factory.mktemp("weights"), assets)


class Modules:
    """The graphs before they become files: what onnxruntime computes where it is not installed."""

    def __init__(self, kit):
        args = parse_args([*kit.flags, "--to", "onnx", "--out", "none"])
        source = load_source(args, with_vision=True)
        self.graphs = {graph.name: graph for graph in graphs(source)}
        self.names = self.graphs[DECODER].in_names[2:]
        self.empty = torch.empty(1, *self.graphs[DECODER].inputs[2][0].shape[1:])[:, :, :0]

    @torch.no_grad()
    def __call__(self, name: str, *inputs):
        return self.graphs[name].module(*inputs)

    def decode(self, states, mask, past):
        logits, *present = self(DECODER, states, mask, past)
        return logits, present


class Sessions:
    """The files."""

    def __init__(self, folder):
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"{package} is not installed")
        from onnxruntime import InferenceSession

        self.sessions = {
            n: InferenceSession(folder / f"{n}.onnx") for n in (VISION, EMBED, DECODER)
        }
        inputs = self.sessions[DECODER].get_inputs()
        self.names = [one.name for one in inputs[2:]]
        self.empty = torch.empty(1, inputs[2].shape[1], 0, inputs[2].shape[3])

    def __call__(self, name: str, *inputs):
        names = [one.name for one in self.sessions[name].get_inputs()]
        return torch.from_numpy(self._run(name, dict(zip(names, inputs, strict=True)))[0])

    def decode(self, states, mask, past):
        inputs = {"inputs_embeds": states, "attention_mask": mask}
        found = self._run(DECODER, inputs | dict(zip(self.names, past, strict=True)))
        logits, *present = map(torch.from_numpy, found)
        return logits, present

    def _run(self, name: str, inputs) -> list[np.ndarray]:
        return self.sessions[name].run(None, {n: t.numpy() for n, t in inputs.items()})


def embedded(runtime, batch) -> torch.Tensor:
    states = runtime(EMBED, batch["input_ids"])
    if batch["image_mask"].any():
        features = runtime(VISION, batch["pixel_values"].flatten(0, -4))
        states[batch["image_mask"]] = features.flatten(0, 1)
    return states


def check_runtime(runtime, kit, folder) -> None:
    """Logits with 0, 1 and 3 pictures, of a batch too, and greedy tokens by the cache."""
    loaded = kit.load()
    model, processor = loaded.model, loaded.processor
    asked = [
        (ask("<image>\n" * n + QUESTION, num_images=n), sample["images"])
        for n, sample in zip(NUM_IMAGES, samples(folder), strict=True)
    ]
    past = [runtime.empty for _ in runtime.names]
    whole = processor.prompt_batch(asked)
    states, mask = embedded(runtime, whole), whole["attention_mask"]
    batched, _ = runtime.decode(states, mask, [one.expand(len(asked), -1, -1, -1) for one in past])
    for row, sample in enumerate(asked):
        batch = processor.prompt_batch([sample])
        with torch.no_grad():
            ours = model(batch["input_ids"], pixel_values=batch["pixel_values"]).logits
        mask = torch.ones_like(batch["input_ids"])
        logits, present = runtime.decode(embedded(runtime, batch), mask, past)
        torch.testing.assert_close(logits, ours, atol=TOLERANCE, rtol=0)
        last = ours.shape[1]
        torch.testing.assert_close(batched[row, -last:], ours[0], atol=TOLERANCE, rtol=0)
        wanted, found = naive_greedy_ids(loaded, sample), [int(logits[0, -1].argmax())]
        while len(found) < len(wanted):
            mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
            states = runtime(EMBED, torch.tensor([found[-1:]]))
            logits, present = runtime.decode(states, mask, present)
            found.append(int(logits[0, -1].argmax()))
        assert found == wanted


@pytest.mark.slow
@GENERATIONS
def test_graphs_compute_what_the_weight_does(generation, kits, tmp_path):
    check_runtime(Modules(kits[generation]), kits[generation], tmp_path)


@pytest.mark.full
@GENERATIONS
def test_files_compute_what_the_weight_does(generation, kits, tmp_path, monkeypatch, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    folder, kit = tmp_path / "onnx", kits[generation]
    export(kit, "onnx", folder)
    check_runtime(Sessions(folder), kit, tmp_path)
    monkeypatch.chdir(folder)
    picture(6).save("picture.png")
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    loaded = kit.load()
    sample = ask("<image>\nWhat is in the picture?", num_images=1), [picture(6)]
    said = loaded.processor.tokenizer.decode(
        naive_greedy_ids(loaded, sample), skip_special_tokens=True
    )
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize(
    ("kit", "flags", "line"),
    [
        ("2_moe", [], "has experts, which --to onnx does not write; take --to transformers"),
        ("2", ["--dtype", "float16"], "--to onnx writes float32"),
        ("2", [], "no onnx and no onnxscript): `pip install onnx onnxscript onnxruntime`"),
    ],
)
def test_what_cannot_be_written_is_one_line(kit, flags, line, kits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx_graphs, "find_spec", lambda name: None)
    out = tmp_path / "out"
    assert main([*kits[kit].flags, "--to", "onnx", "--out", str(out), *flags]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and line in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
