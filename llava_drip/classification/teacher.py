"""A teacher beside the labels: train_imagenet.py --teacher, with the losses of DynamicViT (Rao et al., NeurIPS 2021, 3.3).

The teacher is a classifier of the same classes, asked about the same (mixed) pictures. The student learns from the labels, from
the teacher's logits, and from the teacher's patches: each token is to be what the teacher makes of the same patch, or of a
segment's patches on average. Distillation without labels, of a DRIP from its own dense tower, is distillation.py.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_drip.classification.model import Classifier, data_config_of
from llava_drip.classification.step import Objective
from llava_drip.tokens import TokenBatch
from llava_drip.towers.dense import PREDICTORS
from llava_drip.towers.open_models import open_model

# The paper's, beside the rate loss's (DynamicViT.rate_loss_weight).
WEIGHTS = {"classification": 1.0, "distill_logits": 0.5, "distill_tokens": 0.5}


class Teacher:
    """A frozen classifier in eval mode. No part of the module that is trained: it is neither averaged nor divided among
    processes, and no checkpoint holds it."""

    def __init__(self, model: nn.Module, student: nn.Module):
        """ValueError: not a classifier, or of pictures of another size than the student's."""
        if not getattr(model, "num_classes", 0) or not hasattr(model, "forward_head"):
            raise ValueError(
                f"a {type(model).__name__} without classes; a classifier is needed, as train_imagenet.py trains it"
            )
        self.model = model.eval().requires_grad_(False)
        theirs, ours = data_config_of(model), data_config_of(student)
        if theirs["input_size"] != ours["input_size"]:
            sizes = ["x".join(map(str, config["input_size"][1:])) for config in (theirs, ours)]
            raise ValueError(f"sees pictures of {sizes[0]} pixels, the student of {sizes[1]}; see --img-size")
        mean, std, own_mean, own_std = (
            torch.tensor(config[key])[:, None, None] for config in (ours, theirs) for key in ("mean", "std")
        )
        # From the student's normalised pixels to its own.
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std
        self.device = torch.device("cpu")

    def __deepcopy__(self, memo: dict) -> Teacher:
        """Averaged weights have a copy of the student (timm's ModelEmaV3), and the same teacher."""
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pixels as the student sees them → logits [B, classes], and patches [B, N, D] after the last norm in raster order; None
        where it has none (a CNN, say)."""
        if self.device != x.device:
            self.device, self.model = x.device, self.model.to(x.device)
            self.scale, self.shift = self.scale.to(x.device), self.shift.to(x.device)
        features = self.model.forward_features(x * self.scale + self.shift)
        logits = self.model.forward_head(features)
        if isinstance(features, TokenBatch):
            whole = features.segments is not None and bool((features.segments >= 0).all())
            return logits, features.unpool() if whole else None
        prefix = getattr(self.model, "num_prefix_tokens", None)
        return logits, features[:, prefix:] if features.ndim == 3 and prefix is not None else None


class TaughtClassifier(Classifier):
    """In training pixels → ({"logits", "teacher_logits"} [B, classes] and, where tokens are compared, {"tokens",
    "teacher_tokens"} [T, D], rate loss [B] or None, tokens [B] int64 or None); in eval as Classifier."""

    def __init__(self, model: nn.Module, teacher: Teacher, tokens: bool, freeze_backbone: bool = False, name: str = ""):
        """
        Args:
            tokens: whether the tokens are compared.
        Raises:
            ValueError: a teacher of other classes; tokens that cannot be compared, naming the flag.
        """
        super().__init__(model, freeze_backbone, name)
        self.teacher, self.compares_tokens = teacher, tokens
        logits, patches = teacher(torch.zeros(1, 3, *self.input_size))
        if logits.shape[1] != model.num_classes:
            raise ValueError(f"--teacher: has {logits.shape[1]} classes, --train-data {model.num_classes}")
        if tokens and (why := self._why_no_tokens(patches)):
            raise ValueError(f"--distill-tokens-loss-weight: {why}; give 0 for the teacher's logits alone")

    def _why_no_tokens(self, patches: Tensor | None) -> str | None:
        """Why tokens cannot be compared with these patches [1, N, D]. None: they can."""
        if self.frozen:
            return "no token learns beside --freeze backbone"
        if not self.is_tower:
            return f"the student, a {type(self.model).__name__}, gives no tokens"
        if patches is None:
            return f"the teacher, a {type(self.teacher.model).__name__}, does not give all patches"
        training = self.model.training
        with torch.no_grad():
            tokens = self.model.eval().forward_features(torch.zeros(1, 3, *self.input_size))
        self.model.train(training)
        if tokens.segments is None:
            return f"a token of {type(self.model).__name__} stands for no patches"
        ours, theirs = (tokens.segments.shape[1], tokens.values.shape[1]), tuple(patches.shape[1:])
        if ours != theirs:
            return f"the teacher has {theirs[0]} patches of width {theirs[1]}, the student {ours[0]} of {ours[1]}"
        return None

    def forward(self, x: Tensor) -> tuple[Tensor | dict[str, Tensor], Tensor | None, Tensor | None]:
        if not self.training:
            return super().forward(x)
        teacher_logits, patches = self.teacher(x)
        if not self.is_tower:
            return {"logits": self.model(x), "teacher_logits": teacher_logits}, None, None
        tokens = self.model.forward_features(x)
        outputs = {"logits": self.model.forward_head(tokens), "teacher_logits": teacher_logits}
        if self.compares_tokens:
            some = tokens.sizes > 0  # a SeNaTra's token may be that of no patch
            outputs |= {"tokens": tokens.values[some], "teacher_tokens": tokens.means_of(patches)[some]}
        return outputs, tokens.rate_loss if self.has_boundary_loss else None, tokens.lengths


class TaughtObjective(Objective):
    """Weighted sum of

    classification  cross-entropy, as Objective's
    logits          KL(teacher || student), mean over pictures
    tokens          mean squared difference of each token from the teacher's patches that it stands for; over all tokens of a
                    process's batch, as the official code has it, so pictures of which more is kept count more
    rate            the tower's own (TokenBatch.rate_loss); DynamicViT's holds the shares of kept patches to token_ratio
    """

    def __init__(self, args: Namespace, num_classes: int):
        super().__init__(args, num_classes)
        self.weights = loss_weights(args)

    def forward(self, outputs: dict[str, Tensor], targets: Tensor, rate_loss: Tensor | None) -> dict[str, Tensor]:
        """{"loss", and unweighted "task_loss", "logits_loss", "tokens_loss", "rate_loss", as far as they count}: means over the
        batch, fp32."""
        losses = super().forward(outputs["logits"], targets, rate_loss)
        ours, theirs = (outputs[name].float().log_softmax(1) for name in ("logits", "teacher_logits"))
        losses["logits_loss"] = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        weights = self.weights
        loss = losses["loss"] + (weights["classification"] - 1) * losses["task_loss"]
        loss = loss + weights["distill_logits"] * losses["logits_loss"]
        if "tokens" in outputs:
            losses["tokens_loss"] = F.mse_loss(outputs["tokens"].float(), outputs["teacher_tokens"].float())
            loss = loss + weights["distill_tokens"] * losses["tokens_loss"]
        return {**losses, "loss": loss}


def loss_weights(args: Namespace) -> dict[str, float]:
    """--classification-loss-weight and its like, or the paper's."""
    given = {
        "classification": args.classification_loss_weight,
        "distill_logits": args.distill_logits_loss_weight,
        "distill_tokens": args.distill_tokens_loss_weight,
    }
    return {name: WEIGHTS[name] if value is None else value for name, value in given.items()}


def make_taught(args: Namespace, model: nn.Module) -> TaughtClassifier:
    """--teacher beside its student. ValueError: one that cannot teach it, naming the flag."""
    try:
        teacher = Teacher(open_model(args.teacher), model)
    except ValueError as error:
        raise ValueError(f"--teacher: {error}") from error
    if args.init_from_teacher:
        if Path(args.model).expanduser().is_dir():
            raise ValueError(f"--init-from-teacher: --model {args.model} is a directory with weights of its own")
        _start_from(teacher.model, model)
    tokens = loss_weights(args)["distill_tokens"] > 0
    return TaughtClassifier(model, teacher, tokens, args.freeze == "backbone", name=args.model)


def _start_from(teacher: nn.Module, student: nn.Module) -> None:
    """Copies the teacher's weights, all but those of predictors, which it lacks. ValueError: the two differ in others."""
    theirs, ours = teacher.state_dict(), student.state_dict()
    needed = {name: value for name, value in ours.items() if not name.startswith(PREDICTORS)}
    wrong = [name for name, value in needed.items() if name not in theirs or theirs[name].shape != value.shape]
    wrong += [name for name in theirs if name not in ours]
    if wrong:
        raise ValueError(
            f"--init-from-teacher: teacher and student differ in {len(wrong)} weights, {wrong[0]} the first"
        )
    student.load_state_dict({**ours, **{name: theirs[name] for name in needed}})
