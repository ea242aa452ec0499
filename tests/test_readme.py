"""If this fails, a command or link that a README shows does not work."""

import argparse
import re
import shlex

import pytest
from support.scripts import ROOT

import eval_vlm
import web_demo
from dataset import benchmark_layouts, check_published, convert, doctor, download, prompt_picture
from dataset.synthetic import __main__ as synthetic
from model.export import __main__ as export
from trainer import benchmark, demo, photos, plot, stages, train_clip_tiny, train_tokenizer
from trainer.train_args import parse_args

READMES = ("README.md", "README_zh.md")
LAUNCHERS = {  # options with a value, which stand before the script
    "torchrun": {
        "--nproc_per_node", "--nnodes", "--master_port", "--max-restarts", "--rdzv_backend",
        "--rdzv_endpoint", "--rdzv_id",
    },
    "deepspeed": {"--master_port"},
}  # fmt: skip


def parse_train(stage):
    return lambda argv: parse_args(stage, argv, description="")


PARSERS = {
    "trainer/train_pretrain_vlm.py": parse_train(stages.PRETRAIN),
    "trainer/train_sft_vlm.py": parse_train(stages.SFT),
    "trainer/train_scst_vlm.py": parse_train(stages.SCST),
    "trainer/train_llm.py": parse_train(stages.LLM),
    "trainer/benchmark.py": benchmark.parse_args,
    "trainer/demo.py": demo.parse_args,
    "trainer/photos.py": photos.parse_args,
    "trainer/train_tokenizer.py": train_tokenizer.parse_args,
    "trainer/train_clip_tiny.py": train_clip_tiny.parse_args,
    "trainer/plot.py": plot.parse_args,
    "dataset/synthetic": synthetic.parse_args,
    "dataset/prompt_picture.py": prompt_picture.parse_args,
    "dataset/doctor.py": doctor.parse_args,
    "dataset/benchmark_layouts.py": benchmark_layouts.parse_args,
    "dataset/convert.py": convert.parse_args,
    "eval_vlm.py": eval_vlm.parse_args,
    "model/export": export.parse_args,
    "web_demo.py": web_demo.parse_args,
    "dataset/download.py": download.parse_args,
    "dataset/check_published.py": check_published.parse_args,
}


def commands(readme: str) -> list[str]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    bare = [re.sub(r"\s+# .*", "", line).strip() for line in lines]
    return [line for line in bare if line and not line.startswith("#")]


ALL_COMMANDS = sorted({(r, c) for r in READMES for c in commands(r)})


@pytest.mark.parametrize(("readme", "command"), ALL_COMMANDS)
def test_readme_command_is_valid(readme, command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    if words[0] in LAUNCHERS:
        words = words[1:]
        while words[0].startswith("-"):
            takes_value = words[0].split("=")[0] in LAUNCHERS[command.split()[0]]
            words = words[2 if takes_value and "=" not in words[0] else 1 :]
    elif words[0] == "python":
        words = words[1:]
        if words[0] == "-m":
            name = words[1].replace(".", "/")  # a package runs its __main__.py
            words = [name if (ROOT / name).is_dir() else name + ".py", *words[2:]]
    elif words[0] in ("git", "cd", "pip", "source", "swanlab", "export", "lmms-eval"):
        return
    else:
        raise AssertionError(f"unknown kind of command: {command}")
    assert words[0] in PARSERS, f"no such script: {words[0]}"
    PARSERS[words[0]](words[1:])


def test_readmes_show_the_same_commands():
    english, chinese = (set(commands(r)) for r in READMES)
    assert english == chinese


@pytest.mark.parametrize("readme", READMES)
def test_readme_links_lead_somewhere(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("script", PARSERS)
def test_every_flag_is_explained(script, monkeypatch):
    parsers = []

    def keep(self, *_, **__):
        parsers.append(self)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", keep)
    with pytest.raises(SystemExit):
        PARSERS[script]([])
    (parser,) = parsers
    assert len(parser._actions) > 1
    assert not [a.dest for a in parser._actions if len((a.help or "").strip(" /|")) < 4]
    assert "None" not in re.sub(r"default: None", "", parser.format_help())
