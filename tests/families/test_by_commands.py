"""What a user types, with each family."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from emkd.vlm import load
from tests import tiny
from tests.families.naive import ROWS, call

ALONE = """
import sys, torch
sys.modules["emkd"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
folder, out = sys.argv[1:]
model, report = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
question = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "what is that"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
with torch.no_grad():
    logits = model(**inputs).logits
said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
torch.save({"inputs": dict(inputs), "logits": logits, "said": said}, out)
"""


@pytest.mark.slow
def test_by_commands(family, teacher, student, data, tmp_path, capfd):
    """The commands that a user types: the job on Ray, training that is stopped and resumed, and a student that answers
    without emkd."""
    call("cache-teacher", "--teacher", teacher, "--data", data, "--cache", tmp_path / "cache", "--gpus-per-worker", 0)
    call("inspect", tmp_path / "cache")
    assert f"{len(ROWS)} samples" in capfd.readouterr().out
    (tmp_path / "recipe.yaml").write_text("training: {max_steps: 2, save_steps: 1, learning_rate: 0.001}")
    train = ["train-student", "--student", student, "--data", data, "--cache", tmp_path / "cache", "--batch-size", 2]
    train += ["--recipe", tmp_path / "recipe.yaml", "--vision-pool", 2]
    call(*train, "--output", tmp_path / "out")
    shutil.copytree(tmp_path / "out" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    shutil.copy(tmp_path / "out" / "run.json", tmp_path / "again")
    call(*train, "--output", tmp_path / "again", "--resume")
    trained, again = (load(str(tmp_path / name)) for name in ("out", "again"))
    begun = load(str(student)).model.state_dict()
    weights = trained.model.state_dict()
    assert all(torch.equal(weight, again.model.state_dict()[name]) for name, weight in weights.items())
    assert any(not torch.equal(weight, begun[name]) for name, weight in weights.items())
    (tmp_path / "picture.png").write_bytes(tiny.png(5, 24, 50))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "out", tmp_path / "alone.pt"], capture_output=True, text=True,
        timeout=240, check=False, cwd=tmp_path, env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = torch.load(tmp_path / "alone.pt")
    with torch.no_grad():
        assert torch.equal(alone["logits"], trained.model(**alone["inputs"]).logits)
    assert torch.equal(alone["said"], trained.model.generate(**alone["inputs"], max_new_tokens=3, do_sample=False))
