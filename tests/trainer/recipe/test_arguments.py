"""Fields of transformers.TrainingArguments have their usual effect in a recipe: real runs, checked by their outputs."""

import json
import math
import time

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

import emkd.trainer.run
from emkd.errors import DataFormatError, TrainingDivergedError, UsageError
from emkd.samples import Dataset
from emkd.samples.encode import Encoder
from emkd.trainer import TrainSettings, evaluate_checkpoint, load_recipe, train_student
from emkd.trainer.loop.trainer import DistillationTrainer
from emkd.vlm.loading import load_model
from tests import tiny

pytestmark = pytest.mark.slow


@pytest.fixture
def run(student_path, data_path, cache_path, tmp_path):
    """Trains by a recipe file with these fields and returns (output, metrics)."""

    def train(name="out", *, losses=None, student=None, eval_data=None, data=None, cache=cache_path, **training):
        given = {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            **training,
        }
        content = {"losses": losses or {}, "student": {"vision_pool": 2, **(student or {})}, "training": given}
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(content))
        settings = TrainSettings(
            student=str(student_path), data=str(data or data_path), output=tmp_path / name, recipe=load_recipe(recipe),
            cache=cache and str(cache), eval_data=None if eval_data is None else str(eval_data),
        )  # fmt: skip
        return tmp_path / name, train_student(settings)

    return train


@pytest.fixture
def observed(monkeypatch):
    """The trainers of the runs, each with what its optimizer saw at each step."""
    found = []

    class Watch(TrainerCallback):
        def __init__(self):
            self.gradients, self.rates = [], []

        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
            self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            self.rates.append([group["lr"] for group in optimizer.param_groups])

    class Observed(DistillationTrainer):
        def __init__(self, **given):
            super().__init__(**given)
            self.watch = Watch()
            self.add_callback(self.watch)
            found.append(self)

    monkeypatch.setattr(emkd.trainer.run, "DistillationTrainer", Observed)
    return found


def weights(folder):
    return load_model(folder, dtype="auto").state_dict()


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def relative(found, expected):
    """Of the whole gradient."""
    difference = sum(float((found[n].double() - e.double()).square().sum()) for n, e in expected.items())
    return math.sqrt(difference / sum(float(e.double().square().sum()) for e in expected.values()))


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(run, observed):
    run("float32")
    output, _ = run("bf16", bf16=True)
    exact, rounded = (trainer.watch.gradients[0] for trainer in observed)
    assert 1e-4 < relative(rounded, exact) < 0.1, "another arithmetic, the same gradient"
    assert {value.dtype for value in weights(output).values()} == {torch.float32}


def test_gradient_checkpointing_changes_nothing(run, observed):
    run("plain")
    run("checkpointed", activation_checkpointing=True)
    with pytest.warns(FutureWarning, match="Use `activation_checkpointing` instead"):
        run("older-name", gradient_checkpointing=True)
    plain, *others = (trainer.watch.gradients[0] for trainer in observed)
    for trainer, gradient in zip(observed[1:], others, strict=True):
        assert trainer.model.is_activation_checkpointing
        assert relative(gradient, plain) < 1e-6


def test_schedulers_move_the_learning_rate(run, observed):
    run("linear", lr_scheduler_type="linear", warmup_steps=2, max_steps=6)
    run("constant", lr_scheduler_type="constant")
    run("floor", lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.5}, max_steps=5)
    linear, constant, floor = ([rates[0] for rates in trainer.watch.rates] for trainer in observed)
    assert linear == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert constant == [1e-3] * 4
    assert floor[0] == 1e-3
    assert floor == sorted(floor, reverse=True)
    assert min(floor) > 5e-4


def test_learning_rates_by_module(run, observed, student_path):
    rates = {"model.vision_tower": 1e-5, "model.multi_modal_projector": 0.01}
    run(student={"learning_rates": rates}, lr_scheduler_type="linear")
    groups = observed[0].optimizer.param_groups
    assert {group["initial_lr"] for group in groups} == {1e-3, 1e-5, 0.01}
    assert sum(len(group["params"]) for group in groups) == len(list(observed[0].model.parameters()))
    assert sorted(set(observed[0].watch.rates[2])) == pytest.approx([0.5e-5, 0.5e-3, 0.5e-2])


@pytest.fixture
def scores(monkeypatch):
    """Make evaluations return these accuracies."""

    def decree(*accuracies):
        found = iter(accuracies)
        result = lambda *_, **__: {"accuracy": next(found), "loss": 1.0, "answer_tokens": 1, "skipped_rows": 0}  # noqa: E731
        monkeypatch.setattr("emkd.trainer.loop.trainer.evaluate_answers", result)

    return decree


BEST = {"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "accuracy"}


def test_the_best_checkpoint_is_what_is_saved(run, data_path, scores):
    scores(0.2, 0.7, 0.3, 0.7)
    output, metrics = run(eval_data=data_path, max_steps=6, eval_steps=2, save_steps=2, **BEST)
    state = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())
    found = {entry["step"]: entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry}
    assert found == {2: 0.2, 4: 0.7, 6: 0.3}
    assert state["best_model_checkpoint"] == str(output / "checkpoint-4")
    assert same(weights(output), weights(output / "checkpoint-4"))
    assert not same(weights(output), weights(output / "checkpoint-6"))
    assert metrics["eval_accuracy"] == 0.7


def test_evaluation_on_the_way_is_that_of_the_weights_then(run, data_path):
    output, metrics = run(eval_data=data_path, max_steps=4, eval_strategy="steps", eval_steps=2, save_steps=2)
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    found = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    for step, loss in found.items():
        assert evaluate_checkpoint(str(output / f"checkpoint-{step}"), str(data_path))["loss"] == pytest.approx(loss)
    assert metrics["eval_loss"] == found[4] != found[2]


def test_evaluation_without_data_is_refused(run):
    for training in ({"eval_strategy": "steps"}, {"load_best_model_at_end": True}):
        with pytest.raises(UsageError, match="need data to evaluate on: set --eval-data"):
            run(**training)


def test_how_many_checkpoints_are_kept(run, data_path, scores):
    """The last checkpoint, and the best one if the arguments ask for it."""
    output, _ = run("last", save_steps=1, save_total_limit=1)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]
    scores(0.2, 0.7, 0.3, 0.3, 0.3, 0.7)
    output, _ = run("best", eval_data=data_path, save_steps=1, eval_steps=1, save_total_limit=2, max_steps=5, **BEST)
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-5"}


def test_an_epoch_can_be_saved_and_evaluated_at_its_end(run, data_path):
    output, metrics = run(
        eval_data=data_path, max_steps=-1, num_train_epochs=2, save_strategy="epoch", eval_strategy="epoch"
    )
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert metrics["eval_answer_tokens"] == 27


def test_seeds(run):
    """One seed, one result; another seed, another order."""
    first, again, other = (weights(run(name, seed=seed)[0]) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("persistent", [False, True])
def test_loader_workers_change_nothing(run, persistent):
    alone, _ = run("alone", max_steps=7)
    helped, _ = run("helped", max_steps=7, dataloader_num_workers=2, dataloader_persistent_workers=persistent)
    assert same(weights(alone), weights(helped))


def test_the_remainder_of_an_epoch(run, observed):
    """Six rows in batches of four: two steps an epoch, or one where the last is dropped."""
    run("kept", max_steps=-1, per_device_train_batch_size=4)
    run("dropped", max_steps=-1, per_device_train_batch_size=4, dataloader_drop_last=True)
    assert [trainer.state.global_step for trainer in observed] == [2, 1]
    with pytest.raises(
        UsageError, match="6 samples are less than one batch of 7 .* use a smaller per_device_train_batch_size"
    ):
        run("none", per_device_train_batch_size=7, dataloader_drop_last=True)


def test_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output, _ = run(report_to="tensorboard")
    (events,) = output.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events.parent))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {f"train/{name}" for name in ("loss", "sup", "rld", "vsd", "vlad", "matched_pairs", "retained_mass")} <= tags
    assert len(found.Scalars("train/vsd")) == 4


def test_every_part_of_a_log_line(run, observed):
    """Losses by name with the total that they add up to, and where the time goes."""
    run(max_steps=3, per_device_train_batch_size=6)
    lines = [entry for entry in observed[0].state.log_history if "loss" in entry]
    assert len(lines) == 3
    for line in lines:
        total = 0.5 * line["sup"] + 0.5 * line["rld"] + 0.25 * line["vsd"] + 25 * line["vlad"]
        assert line["loss"] == pytest.approx(total, rel=1e-4)
        assert line["matched_pairs"] == 7 * 4, "seven images, each of four of the student's tokens"
        assert line["retained_mass"] == pytest.approx(1), "this cache stores everything"
        assert 0 < line["assignment_share"] < 0.5
        assert 0 < line["waiting_share"] < 1
        assert line["samples_per_second"] > 1
        assert "skipped_rows" not in line


def test_a_line_of_several_steps_is_their_mean(run, observed):
    run("each", max_steps=4)
    run("both", max_steps=4, logging_steps=2)
    each, both = ([entry for entry in trainer.state.log_history if "loss" in entry] for trainer in observed)
    assert (len(each), len(both)) == (4, 2)
    for name in ("loss", "sup", "rld", "vsd", "vlad", "matched_pairs"):
        means = [(each[n][name] + each[n + 1][name]) / 2 for n in (0, 2)]
        assert [line[name] for line in both] == pytest.approx(means, rel=1e-4), name


def test_evaluations_and_checkpoints_are_no_part_of_the_rate(run, observed, data_path, monkeypatch):
    """Each of them takes a second here: two steps a line, three lines."""
    slow = lambda *_, **__: time.sleep(1) or {"accuracy": 0.5, "loss": 1.0, "answer_tokens": 1, "skipped_rows": 0}  # noqa: E731
    monkeypatch.setattr("emkd.trainer.loop.trainer.evaluate_answers", slow)
    monkeypatch.setattr("emkd.trainer.loop.trainer.complete", lambda folder: time.sleep(1))
    run(eval_data=data_path, eval_strategy="steps", eval_steps=1, save_steps=1, logging_steps=2)
    lines = [entry for entry in observed[0].state.log_history if "loss" in entry]
    assert len(lines) == 2
    assert all(line["samples_per_second"] > 4 for line in lines), "four samples in well under a second"


def test_the_loader_leaves_the_random_state_alone(run, observed):
    run(max_steps=1)
    loader = observed[0].get_train_dataloader()
    before = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_retained_mass_is_that_of_the_logits_used(run, observed, cache_path):
    from emkd.storage.cache import Cache

    run(max_steps=1, per_device_train_batch_size=6, losses={"top_k": 3})
    line = observed[0].state.log_history[0]
    cache = Cache.open(cache_path)
    logits = [torch.from_numpy(cache.record(n).vision.logits).double() for n in range(cache.n_samples)]
    expected = torch.cat(logits).softmax(dim=1)[:, :3].sum(dim=1).mean()
    assert line["retained_mass"] == pytest.approx(float(expected), abs=1e-5)


def test_rows_that_cannot_be_used_are_told_and_limited(run, observed, tmp_path, capsys):
    rows = tiny.rows()
    rows[1]["images"] = [b"broken", tiny.png(3)]
    data = tiny.write_data(tmp_path / "rows.parquet", rows)
    sft = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0}
    recipe = tmp_path / "out.yaml"
    with pytest.raises(
        DataFormatError, match=r"1 of 6 rows cannot be trained on, and max_skipped 0.01 allows 0: row 1: image-broken"
    ):
        run("none", data=data, cache=None, losses=sft)
    content = {
        "losses": sft,
        "max_skipped": 0.2,
        "training": {"per_device_train_batch_size": 1, "num_train_epochs": 2, "logging_steps": 6},
    }
    recipe.write_text(yaml.safe_dump(content))
    settings = TrainSettings(
        student=str(observed[0].student.vlm.path), data=str(data), output=tmp_path / "some",
        recipe=load_recipe(recipe),
    )  # fmt: skip
    capsys.readouterr()
    train_student(settings)
    said = capsys.readouterr().err
    assert said.count("row 1 is skipped: image-broken") == 1, "once, not in each epoch"
    lines = [entry for entry in observed[1].state.log_history if "loss" in entry]
    assert [line["skipped_rows"] for line in lines] == [1, 1]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_a_checkpoint_folder_is_a_model_with_a_card(run, data_path):
    """It loads without the trainer and generates, and its card names what it was trained from."""
    output, _ = run(save_steps=2)
    for folder in (output, output / "checkpoint-2"):
        model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert (report["missing_keys"], report["unexpected_keys"]) == (set(), set())
        processor = AutoProcessor.from_pretrained(folder)
        encoded = Encoder(processor, 2)(Dataset(str(data_path)).sample(0))
        said = model.generate(
            **encoded.inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, suppress_tokens=[2]
        )
        assert said.shape[1] == encoded.n_tokens + 2
        card = (folder / "README.md").read_text()
        for part in (
            "## The teacher",
            "SHA-256 of the teacher's weights",
            "| VLAD | 25 |",
            "learning_rate: 0.001",
            "library_name",
        ):
            assert part in card, part
        assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pkl")]


def test_a_training_that_diverges_is_told(run, observed):
    """Logits of NaN cannot be matched; a loss of NaN is logged as NaN, while Trainer would log the previous loss."""
    wild = {"learning_rate": 1e30, "max_steps": 3, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    with pytest.raises(TrainingDivergedError, match="the training has diverged. Lower the learning rate"):
        run("emkd", **wild)
    with pytest.raises(TrainingDivergedError, match="is infinite or NaN"):
        run("sft", losses={"alpha": 1.0, "beta": 0.0, "gamma": 0.0}, save_strategy="no", **wild)
    losses = [entry["loss"] for entry in observed[1].state.log_history if "loss" in entry]
    assert not all(math.isfinite(loss) for loss in losses)


def test_a_student_that_is_no_good_is_not_saved(run, observed, tmp_path):
    """It diverges in its last step, after which no loss is computed."""
    losses = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0}
    with pytest.raises(TrainingDivergedError, match="is infinite or NaN: .* is not written"):
        run(losses=losses, max_steps=1, learning_rate=1e38, adam_epsilon=1e-30, max_grad_norm=0.0,
            lr_scheduler_type="constant", weight_decay=1e38)  # fmt: skip
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not list((tmp_path / "out").glob("checkpoint-*/complete.json"))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"report_to": "wandb"}, "training section: .*wandb"),
        ({"report_to": "tensorbord"}, "training section: .*tensorbord"),
        ({"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}, "the optimizer .*galore"),
        ({"optim": "adam_of_mine"}, "training section: .*adam_of_mine"),
    ],
)
def test_what_is_not_there_is_said_before_anything_begins(run, training, message, capsys):
    with pytest.raises(UsageError, match=message):
        run(**training)
    assert "training /" not in capsys.readouterr().err


def test_a_metric_that_does_not_exist_is_said_at_once(run, data_path):
    best = {"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "acuracy"}
    with pytest.raises(UsageError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        run(eval_data=data_path, eval_steps=2, save_steps=2, **best)


def test_others_may_read_what_is_saved(run):
    output, _ = run()
    assert (output / "model.safetensors").stat().st_mode == (output / "config.json").stat().st_mode
