"""If this fails, lmms-eval or VLMEvalKit cannot run this model, or it answers there otherwise than
in `eval_vlm.py`.
"""

import base64
import csv
import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tomllib

import pytest
from PIL import Image
from support import benchmark_files as files
from support import harnesses
from support.painted import eval_flags
from support.scripts import ROOT

import eval_vlm
from dataset.evaluation.benchmarks import BENCHMARKS, BenchmarkData
from model.evaluation.evaluator import Evaluator
from model.evaluation.harness import conversation, load_engine, score_answer
from model.generation.engine import VLMEngine

GREEDY = {"max_new_tokens": 12, "temperature": 0, "do_sample": False}
POST = "\nAnswer the question using a single word or phrase."
LMMS = {
    "lmms_eval__api__model": {"lmms": harnesses.Lmms},
    "lmms_eval__models__registry_v2": {"ModelManifest": harnesses.ModelManifest},
}
TASK = """
task: painted_pope
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.results
generation_kwargs: {{max_new_tokens: 12, temperature: 0, do_sample: false}}
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
"""
UTILS = f"""
import io

from PIL import Image


def pictures(doc):
    return [Image.open(io.BytesIO(doc["image"]["bytes"]))]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + {POST!r}


def results(doc, results):
    words = results[0].partition(".")[0].replace(",", "").split(" ")
    says = "no" if {{"No", "no", "not"}} & set(words) else "yes"
    return {{"accuracy": float(says == doc["answer"])}}
"""


@pytest.fixture(scope="module")
def options(assets, painted) -> dict[str, str]:
    """The flags of the painted model as keywords."""
    args = eval_vlm.parse_args(eval_flags(assets, painted))
    names = ("save_dir", "vision_model_path", "tokenizer_path", "device")
    return {name: str(getattr(args, name)) for name in names}


@pytest.fixture(scope="module")
def engine(assets, painted) -> VLMEngine:
    return VLMEngine.from_args(eval_vlm.parse_args(eval_flags(assets, painted)))


@pytest.fixture(scope="module")
def pope(painted, tmp_path_factory):
    path = tmp_path_factory.mktemp("pope") / "test.parquet"
    files.write_pope(path, painted)
    return path


def own_answers(assets, painted, path) -> dict:
    """What `eval_vlm.py` says of the same file."""
    out = path.with_suffix(".json")
    flags = {"benchmark": "pope", "data_path": path, "json": out, "images_path": None}
    argv = eval_flags(assets, painted, **flags, max_new_tokens=12, batch_size=4)
    assert eval_vlm.main(argv) == 0
    return json.loads(out.read_text())


def documents(path) -> list[dict]:
    return [
        {"question": q.question, "image": Image.open(io.BytesIO(q.image))}
        for q in BenchmarkData(BENCHMARKS["pope"], path)
    ]


def messages(doc: dict, **_: object) -> list[dict]:
    parts = [{"type": "image", "url": doc["image"]}]
    parts.append({"type": "text", "text": doc["question"] + POST})
    return [{"role": "user", "content": parts}]


@pytest.fixture
def model(options, pope):
    with harnesses.standing_in(**LMMS):
        from model.evaluation.lmms_eval_model import manifest

        model = harnesses.resolve(manifest())(batch_size="5", max_batch_size=None, **options)
        model.task_dict = {"pope": {"test": documents(pope)}}
        yield model


def request(*begin) -> harnesses.Request:
    return harnesses.Request((*begin, 0, "pope", "test"))


def test_lmms_eval_gets_the_answers_of_eval_vlm(model, assets, painted, pope):
    kinds = [GREEDY | {"until": ["\n\n"]}, GREEDY]  # answers of two kinds are in order all the same
    requests = [
        harnesses.Request(("", messages, kinds[i % 2], i, "pope", "test")) for i in range(12)
    ]
    own = [row[-1] for row in own_answers(assets, painted, pope)["predictions"]]
    assert model.generate_until(requests) == own and len(set(own)) > 1
    stop = own[0][1]
    stopped = model.generate_until([request("", messages, GREEDY | {"until": stop})])
    assert stopped == [own[0].partition(stop)[0]]


def test_likelihood_is_that_of_the_whole_answer(model, engine, pope):
    question = next(iter(BenchmarkData(BENCHMARKS["pope"], pope)))
    pixels = engine.processor.pixel_values([question.image])
    samples = question.candidates(engine.processor, pixels, mode="word", max_length=512)
    features = Evaluator(engine, batch_size=2).encode({"": pixels[0]})[""]
    scores = Evaluator(engine, batch_size=2).score_candidates(samples, features[None, None])[0]
    context = question.question + POST
    requests = [
        request(context, answer, lambda doc: [doc["image"]])
        for answer in (" Yes", lambda doc: "No")
    ]
    for (value, is_greedy), own in zip(model.loglikelihood(requests), scores, strict=True):
        assert value == pytest.approx(-own.loss_sum, abs=1e-3) and is_greedy == own.is_right
    said = model.generate_until([request("", messages, GREEDY | {"max_new_tokens": 64})])[0]
    assert model.loglikelihood([request(context, said, lambda doc: [doc["image"]])])[0][1]


def test_rounds_go_on_until_the_task_ends_them(model):
    seen = []

    def rounds(doc, *, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return messages(doc)
        seen.append((round_idx, list(previous_output), previous_round_info))
        return messages(doc), round_idx == 2, previous_output, f"round {round_idx}"

    (said,) = model.generate_until_multi_round([request("", rounds, GREEDY)])
    assert len(said) == 2 and said[0] == said[1]
    assert seen == [(1, said[:1], None), (2, said, "round 1")]
    assert model.generate_until_multi_round([request("", messages, GREEDY)]) == [said[:1]]


def test_vlmevalkit_gets_the_answers_of_eval_vlm(options, painted, assets, pope, tmp_path):
    own = [row[-1] for row in own_answers(assets, painted, pope)["predictions"]]
    with harnesses.standing_in(vlmeval__vlm__base={"BaseModel": harnesses.BaseModel}):
        from model.evaluation.vlmevalkit_model import MiniMindV

        model = MiniMindV(max_new_tokens=12, **options)
        for i, doc in enumerate(documents(pope)[:3]):
            doc["image"].save(tmp_path / f"{i}.png")
            parts = [
                {"type": "image", "value": str(tmp_path / f"{i}.png")},
                {"type": "text", "value": doc["question"] + POST},
            ]
            assert model.generate(parts, dataset="POPE") == own[i]


def test_text_that_spells_a_tag_stays_text(engine, painted):
    parts = [{"type": "image", "url": str(painted / "images" / "test00.png")}]
    parts.append({"type": "text", "text": "What does <image> mean?"})
    asked = conversation(engine.processor, [{"role": "user", "content": parts}])
    assert asked[0][0]["content"].count("<image>") == 1 == len(asked[1])
    assert score_answer(engine, asked, "red").num_tokens > 1


def test_wrong_use_is_one_clear_line(model, engine, options):
    with pytest.raises(ValueError, match="no model argument weights; there are .*weight"):
        load_engine(weights="x")
    with pytest.raises(ValueError, match="batch_size must be a number of at least 1; got auto"):
        type(model)(batch_size="auto", **options)
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    with pytest.raises(ValueError, match="brings video, and this model takes text and pictures"):
        conversation(engine.processor, video)


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("lmms_eval_model", "pip install lmms_eval"),
        ("vlmevalkit_model", "pip install ms-vlmeval"),
    ],
)
def test_missing_package_is_named(module, command):
    with (
        harnesses.standing_in(lmms_eval__api={}, vlmeval__vlm={}),
        pytest.raises(ImportError) as error,
    ):
        importlib.import_module(f"model.evaluation.{module}")
    assert command in str(error.value)


def test_entry_point_leads_to_the_manifest():
    with (ROOT / "pyproject.toml").open("rb") as file:
        points = tomllib.load(file)["project"]["entry-points"]["lmms_eval.models"]
    assert points == {"minimind_v": "model.evaluation.lmms_eval_model:manifest"}


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms_eval is not installed (0.7.3)"
)
def test_real_lmms_eval_gets_the_answers_of_eval_vlm(
    options, assets, painted, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    path = tmp_path / "test.parquet"
    files.write_pope(path, painted, times=5)
    report = own_answers(assets, painted, path)
    task = tmp_path / "task"
    task.mkdir()
    (task / "painted_pope.yaml").write_text(TASK.format(path=path))
    (task / "utils.py").write_text(UTILS)

    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from model.evaluation.lmms_eval_model import manifest

    MODEL_REGISTRY_V2.register_manifest(manifest())
    found = simple_evaluate(
        model="minimind_v",
        model_args=",".join(f"{name}={value}" for name, value in options.items()),
        tasks=["painted_pope"],
        batch_size=4,
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
    )
    samples = sorted(found["samples"]["painted_pope"], key=lambda sample: sample["doc_id"])
    own = [row[-1].strip() for row in report["predictions"]]
    assert [sample["filtered_resps"][0].strip() for sample in samples] == own and len(own) == 60
    accuracy = next(v for k, v in found["results"]["painted_pope"].items() if "accuracy," in k)
    assert accuracy == pytest.approx(report["categories"]["all"]["generation"]["accuracy"]["value"])


LAUNCHER = """
import sys
from functools import partial

sys.path.insert(0, {root!r})
from vlmeval.config import supported_VLM
from model.evaluation.vlmevalkit_model import MiniMindV

supported_VLM["minimind_v"] = partial(MiniMindV, max_new_tokens=12, **{options!r})
from vlmeval.run import main

main()
"""


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec("vlmeval") is None, reason="vlmeval is not installed (ms-vlmeval)"
)
def test_real_vlmevalkit_gets_the_answers_of_eval_vlm(options, assets, painted, tmp_path):
    """By its command, on a file of ours: a table of questions with pictures in base64."""
    path = tmp_path / "test.parquet"
    files.write_pope(path, painted, times=5)
    own = [row[-1].strip() for row in own_answers(assets, painted, path)["predictions"]]
    with (tmp_path / "painted_openended.tsv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "answer"])
        for number, question in enumerate(BenchmarkData(BENCHMARKS["pope"], path)):
            picture = base64.b64encode(question.image).decode()
            table.writerow([number, picture, question.question + POST, "yes"])
    (tmp_path / "launch.py").write_text(LAUNCHER.format(root=str(ROOT), options=options))
    flags = "--data painted_openended --model minimind_v --mode infer --work-dir"
    done = subprocess.run(
        [sys.executable, tmp_path / "launch.py", *flags.split(), tmp_path / "out"],
        env=os.environ | {"LMUData": str(tmp_path), "PRED_FORMAT": "tsv"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = tmp_path / "out" / "minimind_v" / "minimind_v_painted_openended.tsv"
    with found.open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file, delimiter="\t"), key=lambda row: int(row["index"]))
    assert [row["prediction"].strip() for row in rows] == own and len(own) == 60
