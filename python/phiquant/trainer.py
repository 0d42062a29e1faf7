"""transformers.Trainer trains through grids: a callback that prepares and converts, and a Trainer that distils.

    trainer = DistillationTrainer(model, args, train_dataset=windows, callbacks=[QATCallback("gguf:Q4_0", range="mse")])
    trainer.train()                      # or trainer.train(resume_from_checkpoint=True)
    pq.export(model, tokenizer, "out/", format="gguf")

Importing this module imports transformers, and Trainer needs Accelerate: pip install 'phiquant[hf,train]'.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .engines import QATSchedule
from .errors import PhiquantError
from .extras import need
from .modules import QATEmbedding, QATLinear
from .qat import distillation_loss
from .quantize import Range, What, prepare_qat

need("accelerate", extra="train")
callbacks: Any = need("transformers.trainer_callback", extra="hf")
trainers: Any = need("transformers.trainer", extra="hf")


class QATCallback(callbacks.TrainerCallback, callbacks.ExportableState):
    """Prepares the model when the Trainer is made, freezes ranges on the way, and converts it at the end.

    what, range: as prepare_qat takes them; what=None: the model is prepared already. freeze: as in QATSchedule.
    train_float: also train what stays in float; off, embedding, norms and head remain as they are, as in qat.train.
    convert: store the codes when training ends; False where something is to follow, `finish()` does it then.
    What a checkpoint lacks, the grids and whether they are frozen, goes into its trainer_state.json. To resume with
    other grids is refused.
    """

    def __init__(
        self,
        what: What | None = None,
        range: Range = "mse",
        freeze: float | None = None,
        convert: bool = True,
        train_float: bool = False,
    ) -> None:
        self.what, self.range, self.freeze, self.convert, self.train_float = what, range, freeze, convert, train_float
        self.kept: list[nn.Parameter] = []
        self.schedule: QATSchedule | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self.what is not None:
            prepare_qat(model, self.what, range=self.range)
            if not self.train_float:
                trained = {id(p) for m in model.modules() if isinstance(m, QATLinear | QATEmbedding) for p in _own(m)}
                self.kept = [p for p in model.parameters() if id(p) not in trained and p.requires_grad]
        for parameter in self.kept:
            parameter.requires_grad_(False)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.schedule = QATSchedule(model, state.max_steps, self.freeze)
        if state.global_step:
            saved = (state.stateful_callbacks or {}).get(type(self).__name__)
            if not saved or "grids" not in saved["attributes"]:
                raise PhiquantError(
                    "the checkpoint was saved by a run without QATCallback, so nobody knows its grids; start anew"
                )
            self.schedule.load_state_dict(saved["attributes"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.schedule is not None
        self.schedule.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.convert:
            self.finish()

    def finish(self) -> nn.Module:
        """Store the codes of the trained model, in place, and return it."""
        if self.schedule is None:
            raise PhiquantError("nothing was trained yet; call trainer.train() first")
        for parameter in self.kept:
            parameter.requires_grad_(True)
        return self.schedule.finish()

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps."""
        known = {} if self.schedule is None else self.schedule.state_dict()
        settings = {"freeze": self.freeze, "convert": self.convert, "train_float": self.train_float}
        return {"args": settings, "attributes": known}


def _own(layer: nn.Module) -> list[nn.Parameter]:
    """What the grid rounds, and what a learned grid consists of; the bias stays in float."""
    return [layer.get_parameter("weight"), *layer.get_submodule("weight_quantizer").parameters()]


class DistillationTrainer(trainers.Trainer):
    """A Trainer whose loss is KL(teacher || student) on the logits of the positions that attention_mask shows.

    teacher: default: a copy of `model` as it comes, which must be in float. temperature: of both.
    Other arguments as Trainer takes them. A batch needs no labels; given ones serve evaluation alone.
    """

    loss_is_scaled_for_ga = False  # it is a mean: the Trainer divides it by the number of accumulated batches

    def __init__(self, model: Any, *args: Any, teacher: Any = None, temperature: float = 1.0, **kwargs: Any) -> None:
        self.teacher = copy.deepcopy(model) if teacher is None else teacher
        self.teacher.eval().requires_grad_(False)
        self.temperature = temperature
        super().__init__(model, *args, **kwargs)
        self.teacher.to(self.args.device)
        self.model_accepts_loss_kwargs = False  # the same, for Trainers that do not know the attribute above

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        given = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**given, use_cache=False)
        with torch.no_grad():
            wanted = self.teacher(**given, use_cache=False).logits
        logits, mask = outputs.logits, given.get("attention_mask")
        if mask is not None:
            logits, wanted = logits[mask.bool()], wanted[mask.bool()]
        loss = distillation_loss(logits, wanted, self.temperature)
        return (loss, outputs) if return_outputs else loss
