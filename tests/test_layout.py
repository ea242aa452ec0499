"""The layout that architecture and contributors rely on."""

import ast
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

TOP_LEVEL = {
    "model", "dataset", "trainer", "tests", "out", "checkpoints", "eval_vlm.py", "web_demo.py",
    "requirements.txt", "README.md", "pyproject.toml", "requirements-dev.txt", "Makefile",
    ".gitignore", ".ci", "README_zh.md", "CHANGELOG.md", "BENCHMARKS.md", "CONTRIBUTING.md",
    "LICENSE",
}  # fmt: skip
PACKAGES = ("model", "dataset", "trainer")
# Which of our modules each one may import; scripts are imported by nobody.
ALLOWED = {
    "model.machine.device": set(),
    "model.feed_forward": {"model.machine.device"},
    "model.model_minimind": {"model.feed_forward"},
    "model.image_fusion": set(),
    "model.model_vlm": {"model.image_fusion", "model.model_minimind"},
    "model.vlm_processor": {"model.image_fusion", "model.model_vlm", "model.pictures"},
    "model.weights.strict_loading": {"model.machine.atomic_file"},
    "model.weights.build_model": {
        "model.machine.device",
        "model.model_vlm",
        "model.vlm_processor",
        "model.weights.strict_loading",
    },
    "model.generation.decoding": {"model.model_vlm"},
    "model.generation.attention_map": {
        "model.image_fusion",
        "model.model_minimind",
        "model.model_vlm",
    },
    "model.generation.engine": {
        "model.generation.attention_map",
        "model.generation.decoding",
        "model.machine.device",
        "model.weights.build_model",
        "model.vlm_processor",
    },
    "model.serving.web.text": set(),
    "model.serving.web.attention_picture": set(),
    "model.serving.web.weights": {
        "model.generation.engine",
        "model.weights.build_model",
        "model.weights.strict_loading",
    },
    "model.serving.web.conversation": {
        "model.generation.engine",
        "model.pictures",
        "model.serving.web.privacy",
    },
    "model.serving.web.layout": {
        "model.generation.engine",
        "model.serving.web.conversation",
        "model.serving.web.text",
    },
    "model.serving.web.page": {
        "model.generation.engine",
        "model.serving.web.privacy",
        "model.serving.web.conversation",
        "model.serving.web.layout",
        "model.serving.web.attention_picture",
        "model.serving.web.text",
        "model.serving.web.weights",
    },
    "model.serving.web.server": {
        "model.generation.engine",
        "model.serving.connections",
        "model.serving.hosts",
        "model.serving.web.care",
        "model.serving.web.quota",
        "model.serving.web.conversation",
        "model.serving.web.text",
        "model.serving.web.weights",
    },
    "web_demo": {
        "model.serving.api.server",
        "model.generation.engine",
        "model.options",
        "model.serving.web.server",
        "model.serving.web.weights",
        "model.weights.strict_loading",
    },
    "model.serving.api.request": {
        "model.generation.engine",
        "model.pictures",
        "model.vlm_processor",
    },
    "model.serving.api.reply": {"model.serving.api.request", "model.generation.engine"},
    "model.serving.api.server": {
        "model.serving.api.reply",
        "model.serving.api.request",
        "model.machine.device",
        "model.generation.engine",
        "model.serving.api.body",
        "model.serving.api.connection",
        "model.serving.api.turns",
        "model.serving.hosts",
    },
    "model.serving.terminal_chat": {
        "model.generation.engine",
        "model.pictures",
        "model.machine.terminal",
        "model.vlm_processor",
    },
    "dataset.records.reader": {
        "dataset.records.data_file",
        "dataset.records.fingerprint",
        "dataset.records.images",
        "dataset.records.stray_images",
    },
    "dataset.loss_mask": set(),
    "dataset.lm_dataset": {
        "dataset.records.fingerprint",
        "dataset.loss_mask",
        "dataset.records.reader",
    },
    "dataset.collate": {"dataset.lm_dataset"},
    "dataset.prompt_picture": {"dataset.lm_dataset"},
    "dataset.text_dataset": {
        "dataset.records.data_file",
        "dataset.records.fingerprint",
        "dataset.lm_dataset",
        "dataset.loss_mask",
        "dataset.records.reader",
    },
    "dataset.synthetic.scenes": set(),
    "dataset.synthetic.text": {"dataset.synthetic.scenes"},
    "dataset.synthetic.drawing": {"dataset.synthetic.scenes"},
    "dataset.synthetic": {
        "dataset.synthetic.drawing",
        "dataset.synthetic.text",
        "dataset.synthetic.scenes",
    },
    "dataset.fetching.hub": set(),
    "dataset.fetching.corpus": {"dataset.fetching.hub"},
    "dataset.fetching.assets": {"dataset.fetching.hub"},
    "dataset.download": {
        "dataset.fetching.assets",
        "dataset.fetching.corpus",
        "dataset.fetching.hub",
    },
    "trainer.ranks.group": {"model.machine.device", "trainer.ranks.meeting"},
    "trainer.train_args": {
        "dataset.text_dataset",
        "model.generation.engine",
        "model.options",
        "model.weights.strict_loading",
        "trainer.loop.optimizers",
    },
    "trainer.loop.optimizers": {"model.machine.device"},
    "trainer.ranks.meeting": set(),
    "trainer.tracking.metrics": {"model.machine.atomic_file", "trainer.ranks.group"},
    "trainer.loop.engine": {"model.machine.device", "model.weights.strict_loading"},
    "trainer.loop.zero_engine": {
        "model.weights.strict_loading",
        "trainer.loop.engine",
        "trainer.train_args",
        "trainer.ranks.group",
    },
    "trainer.tracking.trackers": {
        "trainer.tracking.tracker_process",
        "trainer.train_args",
        "trainer.ranks.group",
    },
    "trainer.tracking.tracker_process": set(),
    "trainer.loop.train_loop": {
        "trainer.loop.engine",
        "trainer.loop.loading",
        "trainer.loop.steps",
        "trainer.loop.validation",
        "trainer.tracking.metrics",
        "trainer.loop.optimizers",
        "trainer.ranks.signals",
        "trainer.ranks.group",
    },
    "trainer.ranks.watch": set(),
    "trainer.chain.settings": {
        "model.machine.atomic_file",
        "model.model_vlm",
        "model.weights.strict_loading",
    },
    "trainer.saving.state_file": {"model.machine.atomic_file", "trainer.ranks.group"},
    "trainer.run.preflight": {
        "trainer.tracking.metrics",
        "trainer.loop.train_loop",
        "trainer.ranks.group",
    },
    "trainer.run.build": {
        "dataset.collate",
        "dataset.lm_dataset",
        "dataset.records.reader",
        "dataset.text_dataset",
        "model.machine.device",
        "model.generation.engine",
        "model.model_minimind",
        "model.model_vlm",
        "model.vlm_processor",
        "model.weights.strict_loading",
        "trainer.loop.loading",
        "trainer.run.preflight",
        "trainer.ranks.signals",
        "trainer.train_args",
        "trainer.ranks.group",
    },
    "trainer.tracking.curves": {
        "model.machine.atomic_file",
        "model.options",
        "model.weights.strict_loading",
    },
    "trainer.run.report": {
        "model.weights.strict_loading",
        "trainer.tracking.curves",
        "trainer.train_args",
        "trainer.loop.train_loop",
        "trainer.ranks.group",
    },
    "trainer.saving.run_state": {
        "model.machine.atomic_file",
        "model.vlm_processor",
        "model.weights.strict_loading",
        "trainer.run.build",
        "trainer.loop.engine",
        "trainer.tracking.metrics",
        "trainer.run.report",
        "trainer.saving.state_file",
        "trainer.train_args",
        "trainer.loop.train_loop",
        "trainer.ranks.group",
    },
    "trainer.run.setup": {
        "model.machine.device",
        "model.weights.strict_loading",
        "trainer.run.build",
        "trainer.loop.engine",
        "trainer.loop.loading",
        "trainer.tracking.metrics",
        "trainer.loop.optimizers",
        "trainer.run.preflight",
        "trainer.ranks.watch",
        "trainer.ranks.signals",
        "trainer.run.report",
        "trainer.run.output",
        "trainer.saving.run_state",
        "trainer.saving.lock",
        "trainer.tracking.trackers",
        "trainer.train_args",
        "trainer.loop.train_loop",
        "trainer.ranks.group",
        "trainer.loop.zero_engine",
    },
    "model.evaluation.likelihood": {"model.image_fusion", "model.model_minimind"},
    "model.evaluation.text_metrics": set(),
    "model.evaluation.evaluator": {"model.generation.engine", "model.evaluation.likelihood"},
    "model.evaluation.report": {
        "model.evaluation.evaluator",
        "model.evaluation.likelihood",
        "model.evaluation.text_metrics",
    },
    "model.evaluation.describe": {
        "model.generation.engine",
        "model.pictures",
        "model.machine.terminal",
        "model.vlm_processor",
    },
    "dataset.evaluation.eval_data": {"dataset.lm_dataset", "dataset.records.reader"},
    "dataset.evaluation.multiple_choice": {
        "dataset.evaluation.eval_data",
        "dataset.lm_dataset",
        "dataset.records.reader",
    },
    "eval_vlm": {
        "dataset.evaluation.eval_data",
        "dataset.lm_dataset",
        "dataset.evaluation.multiple_choice",
        "model.serving.terminal_chat",
        "model.evaluation.describe",
        "model.machine.device",
        "model.evaluation.evaluator",
        "model.generation.engine",
        "model.weights.build_model",
        "model.options",
        "model.evaluation.result_files",
        "model.evaluation.report",
        "model.machine.terminal",
        "model.vlm_processor",
        "model.weights.strict_loading",
        "trainer.ranks.group",
    },
    "model.machine.atomic_file": set(),
    "model.machine.terminal": set(),
    "model.evaluation.result_files": {"model.machine.atomic_file"},
    "model.options": set(),
    "dataset.records.fingerprint": set(),
    "trainer.ranks.signals": {"trainer.ranks.group"},
    "trainer.loop.loading": {"trainer.ranks.signals"},
    "trainer.loop.steps": {
        "trainer.loop.loading",
        "trainer.ranks.signals",
        "trainer.ranks.group",
    },
    "trainer.loop.validation": {
        "trainer.loop.engine",
        "trainer.loop.steps",
        "trainer.ranks.signals",
        "trainer.ranks.group",
    },
    "trainer.saving.lock": {"trainer.ranks.group"},
    "trainer.run.output": {"trainer.ranks.signals"},
    "model.pictures": set(),
    "dataset.records.data_file": set(),
    "dataset.records.images": set(),
    "dataset.records.stray_images": set(),
    "model.serving.api.connection": set(),
    "model.serving.api.body": {"model.serving.api.request"},
    "model.serving.api.turns": {"model.serving.api.request"},
    "model.serving.hosts": set(),
    "model.serving.connections": set(),
    "model.serving.web.privacy": {"model.weights.strict_loading"},
    "model.serving.web.presence": set(),
    "model.serving.web.quota": set(),
    "model.serving.web.login": set(),
    "model.serving.web.requests": set(),
    "model.serving.web.uploads": {
        "model.serving.web.quota",
        "model.vlm_processor",
        "model.serving.web.conversation",
        "model.serving.web.text",
    },
    "model.serving.web.care": {"model.serving.web.presence", "model.serving.web.quota"},
    "model.serving.web.guard": {
        "model.serving.web.care",
        "model.serving.web.login",
        "model.serving.web.requests",
        "model.serving.web.uploads",
    },
}
SCRIPTS = {
    "dataset.download",
    "trainer.train_pretrain_vlm",
    "trainer.train_sft_vlm",
    "trainer.train_llm",
    "trainer.train_tokenizer",
    "trainer.train_clip_tiny",
    "trainer.benchmark_saving",
    "trainer.demo",
}
MAX_LINES = 400


def python_files() -> list[Path]:
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return [ROOT / name for name in files]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def own_imports(path: Path, *, module_level: bool) -> set[str]:
    """Our modules that a file imports (only outside functions, where asked)."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if module_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{a.name}" for a in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names = {a.name for a in node.names}
        else:
            continue
        files = {n for n in names if (ROOT / (n.replace(".", "/") + ".py")).is_file()}
        found |= {n for n in files if n.split(".")[0] in (*PACKAGES, "eval_vlm", "web_demo")}
    return found


def test_top_level_holds_only_what_belongs_there():
    tracked = subprocess.run(
        ["git", "-c", "core.quotepath=off", "ls-files"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert {name.split("/")[0] for name in tracked} <= TOP_LEVEL
    assert {"out/.gitkeep", "checkpoints/.gitkeep"} <= set(tracked)


@pytest.mark.parametrize("path", python_files(), ids=module_name)
def test_module_imports_only_what_it_may(path):
    name = module_name(path)
    imports = own_imports(path, module_level=True)
    assert not imports & SCRIPTS or name.startswith("tests."), "a script is imported by nobody"
    if name in ALLOWED:
        assert imports <= ALLOWED[name]
    package = name.split(".")[0]
    is_module = package in PACKAGES and not name.endswith("__init__")
    assert not is_module or name in ALLOWED or name in SCRIPTS, "say here what it may import"
    if package in ("model", "dataset"):  # these know nothing of each other or of trainer/
        assert all(i.split(".")[0] == package for i in imports)


def test_imports_form_no_cycle():
    graph = {module_name(p): own_imports(p, module_level=False) for p in python_files()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", python_files(), ids=module_name)
def test_file_is_short_and_says_what_it_owns(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    assert ast.get_docstring(ast.parse(text)), "no docstring"


def test_tracked_files_name_no_path_of_this_machine():
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        assert str(ROOT.parent) + "/" not in text, path
