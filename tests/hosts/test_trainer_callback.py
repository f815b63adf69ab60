"""The Trainer's callback: LoRA needs no second way, and the Trainer's own logs have the figures."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import trl
from peft import LoraConfig
from torch import nn

from step_optim import Action, Budget, Gate, Ledger, STEPOptimizer, TokenKL, read_log, summarise
from step_optim.hosts.columns import step_optimizer
from step_optim.hosts.model_card import BEGIN, END, add_section
from step_optim.hosts.trainer import STEPCallback
from tests.hosts.common import differing, everything
from tests.hosts.text import forget_accelerator, innermost, policy, quiet, seeded, texts
from tests.models import ragged_control

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))
from tiny import byte_tokenizer

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Leave no shared state to other tests."""
    yield
    forget_accelerator()


def plain(folder: Path, **options: Any) -> transformers.Trainer:
    """The Trainer itself; what is no argument of its own goes into TrainingArguments."""
    own = {name: options.pop(name) for name in ("callbacks", "optimizer_cls_and_kwargs") if name in options}
    arguments = quiet(transformers.TrainingArguments, folder, **options)
    return transformers.Trainer(policy(), arguments, train_dataset=texts(), eval_dataset=texts(2), **own)


def sft(folder: Path, **options: Any) -> Any:
    """TRL's supervised trainer, which adds a LoRA."""
    own = {"callbacks": options.pop("callbacks", None)}
    return trl.SFTTrainer(
        policy(vocab=len(byte_tokenizer())),
        quiet(trl.SFTConfig, folder, **options),
        train_dataset=datasets.Dataset.from_dict({"text": ["one fish", "two fish", "red fish", "blue fish"] * 4}),
        processing_class=byte_tokenizer(),
        peft_config=LORA,
        **own,
    )


def grpo(folder: Path, **options: Any) -> Any:
    """TRL's GRPO, which adds a LoRA."""

    def letters(completions: list[str], **_: Any) -> list[float]:
        return [sum(character.isalpha() for character in text) / 8 for text in completions]

    own = {"callbacks": options.pop("callbacks", None)}
    return trl.GRPOTrainer(
        policy(vocab=len(byte_tokenizer())),
        letters,
        quiet(trl.GRPOConfig, folder, num_generations=2, max_completion_length=8, **options),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["one", "two", "red", "blue"] * 4}),
        processing_class=byte_tokenizer(),
        peft_config=LORA,
        **own,
    )


def on_control(model: Any) -> TokenKL:
    return TokenKL(model, ragged_control())


def callback(folder: Path, budget: Any = 1e-3, **options: Any) -> STEPCallback:
    return STEPCallback(on_control, budget=budget, log=folder / "run.jsonl", **options)


def check_history(trainer: Any, folder: Path, every: int = 1) -> None:
    """Each row of the training log has the figures of the steps since the row before, and no other row has any."""
    records = read_log(folder / "run.jsonl")
    rows = [row for row in trainer.state.log_history if "step_optim/step" in row]
    assert [row["step_optim/step"] + 1 for row in rows] == list(range(every, len(records) + 1, every))
    assert [row["step"] for row in rows] == list(range(every, len(records) + 1, every))
    for row in rows:
        end = int(row["step_optim/step"]) + 1
        figures = summarise(records[end - every : end])
        for name in ("mean_candidate_kl", "max_accepted_kl", "trigger_rate", "mean_alpha", "mean_progress"):
            assert row.get(f"step_optim/{name}") == figures[name]
        assert row["step_optim/path_length"] == pytest.approx(sum(r.accepted.mean for r in records[:end]))
        assert row["step_optim/reference_drift"] == records[end - 1].reference_drift.mean
        assert all(isinstance(value, (int, float)) for name, value in row.items() if name.startswith("step_optim"))
    assert any(row["step_optim/trigger_rate"] > 0 for row in rows)


@pytest.mark.parametrize("host", [plain, sft, grpo])
def test_attached_it_holds_the_budget_and_fills_the_history(host, tmp_path) -> None:
    """One line after the trainer is made, with the optimizer that its arguments name, LoRA or not."""
    trainer = seeded(lambda: host(tmp_path, max_steps=4, save_steps=4))
    callback(tmp_path).attach(trainer)
    trainer.train()
    check_history(trainer, tmp_path)
    records = read_log(tmp_path / "run.jsonl")
    assert len(records) == 4
    assert all(record.accepted.mean <= 1e-3 for record in records)
    assert {record.action for record in records} >= {Action.SHRINK}
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    kept = [row["step_optim/step"] for row in saved["log_history"] if "step_optim/step" in row]
    assert kept == [0, 1, 2, 3]
    assert "step_optim" in torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)


def test_passed_to_the_trainer_it_does_the_same(tmp_path) -> None:
    """`callbacks=[step], optimizer_cls_and_kwargs=step.around(...)` is the run of `attach`, to the bit."""
    left = []
    for name in ("passed", "attached"):
        folder = tmp_path / name

        def make(folder: Path = folder, name: str = name) -> Any:
            step = callback(folder)
            chosen = step.around(torch.optim.AdamW, lr=2e-2, weight_decay=0.1)
            if name == "passed":
                return plain(folder, max_steps=3, callbacks=[step], optimizer_cls_and_kwargs=chosen)
            trainer = plain(folder, max_steps=3)
            trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"lr": 2e-2, "weight_decay": 0.1})
            step.attach(trainer)
            return trainer

        trainer = seeded(make)
        trainer.train()
        check_history(trainer, folder)
        assert (
            innermost(trainer.optimizer).param_groups[0]["weight_decay"] == 0.0
        )  # the Trainer's groups have their own
        left.append(everything(trainer.model, innermost(trainer.optimizer)))
    assert differing(*left) == []


def test_rows_are_of_all_steps_since_the_last_one(tmp_path) -> None:
    """With `logging_steps=2`, and evaluations between: those rows get nothing, and take nothing."""
    trainer = seeded(lambda: plain(tmp_path, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=1))
    callback(tmp_path).attach(trainer)
    trainer.train()
    check_history(trainer, tmp_path, every=2)
    assert not any("step_optim/step" in row for row in trainer.state.log_history if "eval_loss" in row)


def test_steps_after_the_last_row_are_in_the_final_one(tmp_path) -> None:
    """Three steps and a row every two: the third is in the row of the run's times."""
    trainer = seeded(lambda: plain(tmp_path, max_steps=3, logging_steps=2))
    callback(tmp_path).attach(trainer)
    trainer.train()
    assert trainer.state.log_history[-1]["step_optim/step"] == 2
    assert "train_runtime" in trainer.state.log_history[-1]


def test_later_callbacks_and_trackers_see_the_columns(tmp_path, capsys) -> None:
    """The progress bar prints them; so does whatever `report_to` names, where the callback was attached."""
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"max_steps": 2, "disable_tqdm": False, "report_to": "tensorboard"}
    trainer = seeded(lambda: plain(tmp_path / "out", **options))
    callback(tmp_path).attach(trainer)
    trainer.train()
    assert "step_optim/max_accepted_kl" in "".join(capsys.readouterr())
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    events = tensorboard.EventAccumulator(str(folder))
    events.Reload()
    (tag,) = (tag for tag in events.Tags()["scalars"] if tag.endswith("step_optim/max_accepted_kl"))
    assert [each.step for each in events.Scalars(tag)] == [1, 2]


def test_the_printer_prints_them(tmp_path, capsys) -> None:
    """Without a progress bar the Trainer prints its rows."""
    step = callback(tmp_path)
    chosen = step.around(torch.optim.SGD, lr=0.1)
    trainer = seeded(lambda: plain(tmp_path, max_steps=1, callbacks=[step], optimizer_cls_and_kwargs=chosen))
    trainer.train()
    assert "'step_optim/trigger_rate': " in capsys.readouterr().out


def test_it_resumes_to_the_bit(tmp_path) -> None:
    """From the third step's checkpoint: weights, state, decisions and rows of the uninterrupted run."""
    left, stories = [], []
    for name in ("whole", "resumed"):
        folder = tmp_path / name

        def make(folder: Path = folder) -> Any:
            trainer = plain(folder)
            callback(folder).attach(trainer)
            return trainer

        trainer = seeded(make)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3") if name == "resumed" else None)
        left.append(everything(trainer.model, innermost(trainer.optimizer)))
        rows = [row for row in trainer.state.log_history if "step_optim/step" in row]
        stories.append([{key: row[key] for key in row if "overhead" not in key} for row in rows])
    assert differing(*left) == []
    assert stories[0] == stories[1]


def test_the_optimizer_of_the_arguments(tmp_path) -> None:
    """`around(arguments)` takes what `optim=` names."""
    step = callback(tmp_path, budget=Budget(mean=1.0))
    arguments = quiet(transformers.TrainingArguments, tmp_path, optim="adafactor")
    kind, options = step.around(arguments)
    made = kind([nn.Parameter(torch.zeros(2))], **options)
    assert type(made) is STEPOptimizer
    assert type(made.optimizer).__name__ == "Adafactor"


def test_embeddings_of_8_bit_optimizers_stay_in_32(tmp_path, monkeypatch) -> None:
    """The Trainer looks for bitsandbytes in the name of the class, and has to find it."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes.optim.GlobalOptimManager, "_instance", None)  # what is asked for here is for here
    trainer = seeded(lambda: plain(tmp_path, max_steps=1, optim="adamw_bnb_8bit"))
    callback(tmp_path).attach(trainer)
    trainer.train()
    assert isinstance(innermost(trainer.optimizer), bitsandbytes.optim.AdamW)
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    embedding = trainer.model.get_input_embeddings()
    assert any(module is embedding for module, _, _ in manager.module_weight_config_triple)


def test_a_factory_is_wrapped_as_one(tmp_path) -> None:
    """Optimizers that split the model's parameters themselves come as factories, called with the model."""

    def factory() -> Any:
        return lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr)

    kind, options = callback(tmp_path).around(factory, lr=0.5)
    made = kind()(nn.Linear(2, 2), **options)
    assert type(made) is STEPOptimizer
    assert made.param_groups[0]["lr"] == 0.5


def test_figures_alone_of_an_optimizer_that_is_there(tmp_path) -> None:
    """`STEPCallback()` adds columns to a run whose optimizer was wrapped by hand."""
    trainer = seeded(lambda: plain(tmp_path, max_steps=2))
    trainer.create_optimizer()
    log = tmp_path / "run.jsonl"
    trainer.optimizer = STEPOptimizer(trainer.optimizer, kl=on_control(trainer.model), budget=1e-3, log=log)
    STEPCallback().attach(trainer)
    trainer.train()
    check_history(trainer, tmp_path)


def test_an_optimizer_that_is_there_is_wrapped(tmp_path) -> None:
    """So is one that was given bare, as `optimizers=`."""
    trainer = seeded(lambda: plain(tmp_path, max_steps=2))
    trainer.create_optimizer()
    callback(tmp_path).attach(trainer)
    trainer.train()
    check_history(trainer, tmp_path)
    assert step_optimizer(trainer.optimizer) is not None


@pytest.mark.parametrize("host", [plain, sft])
def test_the_model_card_has_a_section_and_only_one(host, tmp_path) -> None:
    """Every card that the trainer writes tells the budget and what came of it; the rest of the card stays."""
    trainer = seeded(lambda: host(tmp_path, max_steps=2, save_strategy="no"))
    step = callback(tmp_path, controller=Gate()).attach(trainer)
    trainer.create_model_card(model_name="before")  # nothing to tell yet
    assert "Trust region" not in (tmp_path / "README.md").read_text()
    trainer.train()
    for _ in range(2):
        trainer.create_model_card(model_name="after")
        step.add_to_card(tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Trust region") == 1
    assert "| Budget | `Budget(mean=0.001" in card
    assert "| Controller | `Gate" in card
    assert "| Steps | 2 |" in card
    assert f"| Rejected | {step_optimizer(trainer.optimizer).summary()['rejection_rate']:.1%} |" in card
    assert card.startswith("---")  # its metadata
    assert "after" in card


def test_a_card_that_is_not_there_is_begun_and_what_others_wrote_stays(tmp_path) -> None:
    """Sections before and after stay where they are, when ours is replaced."""
    trainer = seeded(lambda: plain(tmp_path, max_steps=1))
    step = callback(tmp_path).attach(trainer)
    with pytest.raises(RuntimeError, match="train first"):
        step.card()
    trainer.train()
    card = tmp_path / "card.md"
    step.add_to_card(card)
    assert card.read_text() == step.card()
    card.write_text(f"# Mine\n\n{step.card()}\n## Below\n")
    step.add_to_card(card)
    assert card.read_text() == f"# Mine\n\n## Below\n\n{step.card()}"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"kl": on_control}, TypeError, "give both"),
        ({"budget": 0.1}, TypeError, "give both"),
        ({"log": "run.jsonl"}, TypeError, "give both"),
        ({"kl": on_control, "budget": -1.0}, ValueError, "mean=-1.0"),
        ({"kl": on_control, "budget": 1.0, "on_error": "stop"}, ValueError, "on_error='stop' is unknown"),
        ({"kl": on_control, "budget": 1.0, "controler": Gate()}, TypeError, "controler"),
        ({"kl": 3, "budget": 1.0}, TypeError, "kl=3 is neither a KL closure nor a function of the model"),
        ({"kl": lambda: 0.0, "budget": 1.0}, TypeError, "nor a function of the model"),
    ],
)
def test_bad_arguments_are_refused_when_it_is_made(arguments, error, text) -> None:
    """And not when the Trainer makes its optimizer, hours later."""
    with pytest.raises(error, match=text):
        STEPCallback(**arguments)


def test_a_trainer_without_step_is_refused(tmp_path) -> None:
    """A callback that was passed without its other half says so when training begins."""
    with pytest.raises(RuntimeError, match="found no STEPOptimizer"):
        plain(tmp_path, callbacks=[callback(tmp_path)], max_steps=1).train()
    trainer = plain(tmp_path, max_steps=1)
    STEPCallback().attach(trainer)
    with pytest.raises(RuntimeError, match="has no STEPOptimizer"):
        trainer.train()


def test_a_second_trust_region_is_refused(tmp_path) -> None:
    """Its budget would be ignored: where another callback or somebody else has wrapped the optimizer."""
    trainer = seeded(lambda: plain(tmp_path, max_steps=1))
    callback(tmp_path).attach(trainer)
    callback(tmp_path, budget=1.0).attach(trainer)
    with pytest.raises(RuntimeError, match=r"is a STEPOptimizer already, with Budget\(mean=0.001\)"):
        trainer.train()
    trainer = seeded(lambda: plain(tmp_path, max_steps=1))
    trainer.create_optimizer()
    trainer.optimizer = STEPOptimizer(trainer.optimizer, kl=on_control(trainer.model), budget=1e-3)
    with pytest.raises(RuntimeError, match="is a STEPOptimizer already"):
        callback(tmp_path, budget=1.0).attach(trainer)
    trainer.add_callback(callback(tmp_path, budget=1.0))
    with pytest.raises(RuntimeError, match="is a STEPOptimizer already"):
        trainer.train()


def test_what_is_set_after_it_was_attached_counts(tmp_path) -> None:
    """As in a search over learning rates: each trial has a model and arguments of its own."""
    arguments = quiet(transformers.TrainingArguments, tmp_path, max_steps=1, lr_scheduler_type="constant")
    trainer = seeded(lambda: transformers.Trainer(args=arguments, model_init=lambda _: policy(), train_dataset=texts()))
    step = callback(tmp_path).attach(trainer)
    for rate in (1e-5, 1e-2):
        trainer.args.learning_rate = rate
        trainer.train(trial={})
        assert step_optimizer(trainer.optimizer).last.lr[0] == rate
    assert step._optimizer is step_optimizer(trainer.optimizer)


class OwnOptimizer(transformers.Trainer):
    """A Trainer that makes its optimizer itself."""

    def create_optimizer(self, *_: Any) -> Any:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer


def test_a_trainer_that_makes_its_optimizer_itself(tmp_path) -> None:
    """Whatever `create_optimizer` returns is wrapped."""
    arguments = quiet(transformers.TrainingArguments, tmp_path, max_steps=2)
    trainer = seeded(lambda: OwnOptimizer(policy(), arguments, train_dataset=texts()))
    callback(tmp_path, budget=1e-4).attach(trainer)
    trainer.train()
    check_history(trainer, tmp_path)
    assert type(innermost(trainer.optimizer)) is torch.optim.SGD


def test_rows_that_are_not_of_training_take_nothing(tmp_path) -> None:
    """Evaluations under another name, and what users log."""

    class Logging(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.log({"mine": 1.0})
            return super().compute_loss(*args, **kwargs)

    arguments = quiet(transformers.TrainingArguments, tmp_path, max_steps=4, logging_steps=2)
    trainer = seeded(lambda: Logging(policy(), arguments, train_dataset=texts(), eval_dataset=texts(2)))
    callback(tmp_path).attach(trainer)
    trainer.train()
    check_history(trainer, tmp_path, every=2)
    trainer.evaluate(metric_key_prefix="test")
    assert "step_optim/step" not in trainer.state.log_history[-1]


def test_the_table_of_a_notebook_has_columns(tmp_path, monkeypatch) -> None:
    """It shows the loss alone of what the Trainer logs; whatever else there is, its lines get."""
    shown = types.ModuleType("IPython.display")
    shown.HTML, shown.display = (lambda html: html), (lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    from transformers.utils.notebook import NotebookProgressCallback

    trainer = seeded(lambda: plain(tmp_path, max_steps=3))
    trainer.add_callback(NotebookProgressCallback)
    callback(tmp_path).attach(trainer)
    (notebook,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, NotebookProgressCallback))
    tables = []
    begin = notebook.on_train_begin

    def kept(*args: Any, **kwargs: Any) -> None:
        begin(*args, **kwargs)
        tables.append(notebook.training_tracker)

    notebook.on_train_begin = kept
    trainer.train()
    head, *lines = tables[0].inner_table
    assert {"Step", "Training Loss", "Largest KL", "Over budget", "Drift"} <= set(head)
    records = read_log(tmp_path / "run.jsonl")
    place = head.index("Largest KL")
    assert [float(line[place]) for line in lines] == pytest.approx([record.accepted.mean for record in records])


@pytest.mark.parametrize("given", ["adamw_torch", None, torch.optim.SGD([nn.Parameter(torch.zeros(1))])])
def test_what_is_no_class_of_optimizers_is_refused(given, tmp_path) -> None:
    """Now, and not when the Trainer calls it."""
    with pytest.raises(TypeError, match="needs a class of optimizers"):
        callback(tmp_path).around(given)


def test_what_is_between_markers_of_others_stays(tmp_path) -> None:
    """A card that speaks of the markers loses nothing, and a section without an end is refused."""
    card = tmp_path / "README.md"
    card.write_text(f"It has {BEGIN} and {END} in a line.\n\nPrecious.\n")
    for _ in range(2):
        add_section(card, f"{BEGIN}\nours\n{END}\n")
    assert card.read_text() == f"It has {BEGIN} and {END} in a line.\n\nPrecious.\n\n{BEGIN}\nours\n{END}\n"
    card.write_text(f"{BEGIN}\nours\n\n## My own results\n\nPrecious.\n")
    with pytest.raises(ValueError, match="without a line"):
        add_section(card, f"{BEGIN}\nours\n{END}\n")
    assert "Precious." in card.read_text()
    add_section(tmp_path / "new" / "README.md", "ours\n")
    assert (tmp_path / "new" / "README.md").read_text() == "ours\n"


def dpo(folder: Path, model: Any = None, **options: Any) -> Any:
    """TRL's DPO, which adds a LoRA."""
    pairs = {
        "prompt": ["one", "two", "red", "blue"] * 4,
        "chosen": [" fish"] * 16,
        "rejected": [" dogs"] * 16,
    }
    return trl.DPOTrainer(
        model,
        args=quiet(trl.DPOConfig, folder, **options),
        train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=byte_tokenizer(),
        peft_config=LORA,
    )


def test_a_ledger_holds_caps_over_sft_and_dpo(tmp_path) -> None:
    """Each stage trains an adapter of its own, merged before the next; the first policy is pi_ref of both."""
    ledger, budget = tmp_path / "ledger.json", Budget(mean=1e-3, path=2.5e-3, drift=3e-3)
    first = seeded(lambda: sft(tmp_path / "sft", max_steps=2, save_strategy="no"))
    callback(tmp_path / "sft", budget, ledger=Ledger(ledger, stage="sft")).attach(first)
    first.train()
    merged = first.model.merge_and_unload()
    second = seeded(lambda: dpo(tmp_path / "dpo", merged, max_steps=4, save_strategy="no"))
    callback(tmp_path / "dpo", budget, ledger=Ledger(ledger, stage="dpo")).attach(second)
    second.train()

    records = [record for stage in ("sft", "dpo") for record in read_log(tmp_path / stage / "run.jsonl")]
    figures = Ledger(ledger).figures()
    assert [stage["stage"] for stage in figures["stages"]] == ["sft", "dpo"]
    assert [stage["steps"] for stage in figures["stages"]] == [2, 4]
    assert figures["path"] == pytest.approx(sum(record.accepted.mean for record in records), rel=1e-12)
    assert figures["path"] <= 2.5e-3
    assert {"path", "drift"} <= {record.bound for record in records}
    assert figures["displacement"] == records[-1].reference_drift.mean <= 3e-3
    model = policy(vocab=len(byte_tokenizer()))  # as it was before the first stage
    observer = TokenKL(model, ragged_control())
    observer.anchor()
    model.load_state_dict(second.model.merge_and_unload().state_dict())
    assert figures["displacement"] == pytest.approx(observer.audit().movement.mean, rel=1e-3)
