"""Hugging Face Trainer with the manifest's loss weights.

    class WeightedTrainer(WeightedLoss, Trainer): ...      # the class below

Trainer drops columns that the model does not know, and its `compute_loss_func` does not see the
inputs, so weights need a `compute_loss` of their own. Shapes: B rows, T tokens, C classes.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

IGNORE = -100
WEIGHT = "weight"

if TYPE_CHECKING:
    from torch.utils.data import Sampler

    _Base = Trainer
else:
    _Base = object


class WeightedLoss(_Base):
    """Mixin, before a Trainer: multiplies each row's loss by its `weight`.

    One target a row: the mean over the rows of a step of w_i l_i (weights have mean 1 over the
    selection, so the gradient's expectation is the weighted one). Tokens: sum(w_d l_dt) /
    sum(w_d n_d) over documents d with n_d target tokens, as `batch_loss` of our own training. Both
    over all batches that are accumulated to a step, not batch by batch; across devices too, unless
    `average_tokens_across_devices` is off.

    `weight` is a column of the data set, [B], or [B, T] where a collator packed documents (aligned
    with `labels`; a token's weight is that of the token predicted). Rows without it weigh 1. Give
    `train_sampler` the `EpochSampler` of a manifest to show rows as its weights of kind `sampling`
    or `repeat`, or its schedule, say; weights that it follows are not multiplied into the loss
    again. Without one Trainer shows every row once, in its own order, and weighs by any kind.

    Labels are class numbers [B], token numbers [B, T] (shifted for causal models), or float targets
    (squared error [B]; sigmoid cross-entropy [B, C]).
    """

    loss_is_scaled_for_ga = True
    """The sum over a step's batches is divided by the step's whole weight at once."""

    shifts_labels: bool | None = None
    """Whether the label of token t is what token t - 1 predicts; None: as the model's class says.
    """

    def __init__(
        self, *args: Any, train_sampler: "Sampler[int] | None" = None, **kwargs: Any
    ) -> None:
        self.train_sampler = train_sampler
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                "weights do not combine with label_smoothing_factor or compute_loss_func; "
                "leave them out"
            )
        # Older versions know no `loss_is_scaled_for_ga` and take this for it. The model itself is
        # never asked for the loss.
        self.model_accepts_loss_kwargs = True

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._signature_columns is not None and WEIGHT not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, WEIGHT]

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> "Sampler[int] | None":
        if self.train_sampler is not None:
            return self.train_sampler
        return super()._get_train_sampler(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | None]:
        """Return a step's batches and its whole weight: rows, or weighted target tokens."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if getattr(self.train_sampler, "follows_weights", False):
            for batch in batches:  # the sampler has weighed already
                batch.pop(WEIGHT, None)
        if not batches or "labels" not in batches[0]:
            return batches, None
        total = torch.stack([self._mass(batch) for batch in batches]).sum()
        total = total.to(self.args.device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return batches, total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted loss of a batch as its part of the step's."""
        inputs = dict(inputs)
        if "labels" not in inputs:
            raise ValueError(
                f"a weighted loss needs 'labels' among the inputs; here are: {', '.join(inputs)}"
            )
        weight, labels = inputs.pop(WEIGHT, None), inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        losses, counted = self._losses(logits, labels)
        each = _spread(weight, labels, losses, self._shifts)
        total = (each * losses * counted).sum()
        mass = num_items_in_batch
        if mass is None:
            mass = (each * counted).sum() if losses.dim() > 1 else losses.new_tensor(len(losses))
        loss = total / torch.as_tensor(mass, device=total.device).clamp(min=1e-12)
        if (
            num_items_in_batch is not None
            and self.args.average_tokens_across_devices
            and self.args.world_size > 1
        ):
            loss = loss * self.accelerator.num_processes  # gradients are averaged over devices
        if not return_outputs:
            return loss
        outputs = {"loss": loss, **outputs} if isinstance(outputs, dict) else (loss, *outputs)
        return loss, outputs

    @property
    def _shifts(self) -> bool:
        if self.shifts_labels is not None:
            return self.shifts_labels
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "get_base_model"):  # adapters
            model = model.get_base_model()
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return False
        name = type(model).__name__
        return name.endswith(("ForCausalLM", "LMHeadModel")) or name in CAUSAL.values()

    def _mass(self, batch: dict[str, Any]) -> Tensor:
        labels = batch["labels"]
        if labels.is_floating_point() or labels.dim() < 2:
            return torch.tensor(float(len(labels)), device=labels.device)
        targets = labels[:, 1:] if self._shifts else labels
        counted = (targets != IGNORE).to(torch.float32)
        each = _spread(batch.get(WEIGHT), labels, counted, self._shifts)
        mass: Tensor = (each * counted).sum()
        return mass

    def _losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each row [B] or token [B, T], and 1 where it counts, 0 where not."""
        if labels.is_floating_point():
            if labels.dim() > 1 and labels.shape[-1] > 1:
                losses = nn.functional.binary_cross_entropy_with_logits(
                    logits.float(), labels, reduction="none"
                ).mean(-1)
            else:
                losses = (logits.float().reshape(len(labels)) - labels.reshape(-1)) ** 2
            return losses, torch.ones_like(losses)
        if labels.dim() == 1:
            losses = nn.functional.cross_entropy(
                logits.float(), labels, ignore_index=IGNORE, reduction="none"
            )
            return losses, (labels != IGNORE).to(losses.dtype)
        if self._shifts:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
        ).reshape(labels.shape)
        return losses, (labels != IGNORE).to(losses.dtype)


class WeightedTrainer(WeightedLoss, Trainer):
    """`transformers.Trainer` with `WeightedLoss`."""


def _spread(weight: Tensor | None, labels: Tensor, losses: Tensor, shifts: bool) -> Tensor:
    """Return the weight of each loss."""
    if weight is None:
        return torch.ones_like(losses)
    weight = weight.to(losses.device, losses.dtype)
    if weight.dim() == 2 and losses.dim() == 2:
        if weight.shape != labels.shape:
            raise ValueError(
                f"weights of tokens have the shape of labels, {tuple(labels.shape)}, not "
                f"{tuple(weight.shape)}"
            )
        return weight[:, 1:] if shifts else weight
    return weight.reshape(-1, *[1] * (losses.dim() - 1)).expand_as(losses)
