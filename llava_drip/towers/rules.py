"""Boundary rules: what says where one segment ends and the next begins. `boundary=` of Drip chooses one.

gumbel      a small MLP over how the features on both sides differ; learned from the task through Gumbel-Sigmoid samples
similarity  how far the learned projections of both sides point apart; the same samples
entropy     where the next patch is hard to foretell; learned by foretelling it, not from the task
uniform     even cuts, nothing learned: simulated boundaries for counting operations, and a baseline

A rule is asked about packed tokens [T, D] and answers with logits [T] fp32: entry t is about the place between token t and the
next one of the same image. What it says behind an image's last token is ignored.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llava_drip.tokens import Packing
from llava_drip.towers.attention import packed_attention
from llava_drip.towers.boundaries import most_probable, most_probable_of_batch, unlimited


class BoundaryRule(nn.Module, ABC):
    """What all rules have. State dict: size_scale [D], and what the rule learns.

    Attributes:
        samples: training draws boundaries at random with the rule's probabilities, and the rate loss acts on these.
        has_loss: training gives a loss to add to the task's: the rate loss, or one of the rule's own.
        measure: in words, what the sigmoid of a logit is; drawings say it.
        size_scale: what a token knows of its size: log(patches) times this vector is added to it (0 for a single patch).
    """

    samples = has_loss = True
    measure = "boundary probability"

    def __init__(self, dim: int, compression: float):
        """dim: width of the tokens. compression: target units per token, >= 1."""
        super().__init__()
        self.compression = compression
        self.size_scale = nn.Parameter(torch.zeros(dim))

    def init_weights(self) -> None:
        """Random weights anew."""
        nn.init.trunc_normal_(self.size_scale, std=0.02)

    @abstractmethod
    def forward(self, x: Tensor, content: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            x: [T, D] features that reached the pooling.
            content: [T, D] patch embeddings without positions, before any block (means of them where x was pooled before).
            packing: lengths of the images, sum T.
        Returns:
            logits [T] fp32, and a loss [B] fp32 of the rule's own to be added to the task's, in training (None: it has none).
        """

    def unlimited(self, logits: Tensor) -> Tensor:
        """[B] int64 boundaries where each image decides. logits: [B, L], see boundaries.py."""
        return unlimited(logits)

    def choose(self, logits: Tensor, boundaries: Tensor, over: str = "image") -> Tensor:
        """[B, L] bool: that many boundaries in each image, at its most probable places; or, over the "batch", as many in all."""
        return most_probable_of_batch(logits, boundaries) if over == "batch" else most_probable(logits, boundaries)

    def bias_at_rate(self) -> float:
        """The logit from which sampling starts near the target rate."""
        rate = min(1 / self.compression, 0.95)
        return math.log(rate / (1 - rate))

    def extra_repr(self) -> str:
        return f"compression={self.compression}"


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, D] → both sides of each place, [T, D] each; behind the last token it is the token itself."""
    return x, torch.cat([x[1:], x[-1:]])


class GumbelBoundaries(BoundaryRule):
    """A 2-layer MLP over |difference| of the normalised features on both sides.

    State dict: norm.*, fc1.*, fc2.*, size_scale.
    """

    def __init__(self, dim: int, compression: float, hidden: int | None = None):
        """hidden: MLP width, default dim / 4."""
        super().__init__(dim, compression)
        hidden = max(dim // 4, 16) if hidden is None else hidden
        self.norm = nn.LayerNorm(dim, bias=False)  # a bias would cancel in the difference
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, 1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random weights that are all positive, so that a boundary is likelier where neighbours differ more, and a bias from
        which sampling starts near the target rate.

        From weights of either sign some runs learn the opposite, boundaries within what is uniform: the task is served nearly
        as well, and neither way leads to the other (docs/results/boundaries.md).
        """
        super().init_weights()
        self.norm.reset_parameters()
        for layer in (self.fc1, self.fc2):
            nn.init.uniform_(layer.weight, 0, 2 / layer.in_features)
            nn.init.zeros_(layer.bias)
        usual = 0.4  # what the weights above make of neighbours in pictures, on average
        nn.init.constant_(self.fc2.bias, self.bias_at_rate() - usual)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Towers of former versions have a norm.bias, which did nothing."""
        state_dict.pop(f"{prefix}norm.bias", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, content: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
        left, right = neighbours(self.norm(x))
        hidden = F.gelu(self.fc1((right - left).abs()))
        return self.fc2(hidden).squeeze(-1).float(), None


class SimilarityBoundaries(BoundaryRule):
    """A boundary where the projected features of neighbours point apart: H-Net's routing (Hwang, Wang, Gu, 2025,
    arXiv:2507.07955).

    logit = sharpness x (1 - cos(Wq left, Wk right)) + bias. The sharpness is positive whatever is learned, so "more alike, more
    of a boundary" can only be learned through the projections, which start as the identity.

    State dict: norm.*, query.weight, key.weight [hidden, D], sharpness [1], bias [1], size_scale.
    """

    def __init__(self, dim: int, compression: float, hidden: int | None = None):
        """hidden: width of the projections, default dim / 4."""
        super().__init__(dim, compression)
        hidden = max(dim // 4, 16) if hidden is None else hidden
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, hidden, bias=False)
        self.key = nn.Linear(dim, hidden, bias=False)
        self.sharpness = nn.Parameter(torch.zeros(1))  # not (): FSDP divides no scalar
        self.bias = nn.Parameter(torch.zeros(1))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """One random projection for both sides: cosines as those of the features themselves."""
        super().init_weights()
        self.norm.reset_parameters()
        nn.init.normal_(self.query.weight, std=self.query.in_features**-0.5)
        self.key.weight.copy_(self.query.weight)
        nn.init.constant_(self.sharpness, math.log(math.expm1(4.0)))  # softplus of it is 4
        usual = 4.0 * 0.27  # 1 - cosine of neighbours in photographs, on average
        nn.init.constant_(self.bias, self.bias_at_rate() - usual)

    def forward(self, x: Tensor, content: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
        x = self.norm(x)
        left, _ = neighbours(self.query(x))
        _, right = neighbours(self.key(x))
        apart = 1 - F.cosine_similarity(left.float(), right.float(), dim=-1)
        return F.softplus(self.sharpness) * apart + self.bias, None


class EntropyBoundaries(BoundaryRule):
    """A boundary where the entropy of the prediction of the next patch spikes above its left neighbours: the rule of entropy
    spikes of Dynamic Token Pooling (Nawrot et al., ACL 2023), for pictures.

    A light causal head (one attention layer over the patch embeddings along the scan) predicts a code of the next patch and is
    trained by cross-entropy beside the task; embeddings are detached, so neither disturbs the other. Codes come from a frozen
    random projection and codebook, the nearest by cosine, which cannot collapse (BEST-RQ, Chiu et al., ICML 2022).
    The logit is the spike, entropy minus the largest of the `window` before, less a threshold that met the target rate over the
    past batches of training, in standard deviations; no log-odds, so its sigmoid is a score and no probability. Nothing is
    sampled, and there is no rate loss: its place is taken by the head's cross-entropy.

    State dict: norm.*, project.*, qkv.*, out.*, codebook [codes, 16], projection [D, 16], threshold and spread (fp32 scalars),
        num_batches_tracked (int64 scalar, batches that threshold has followed; 0: it says nothing yet), size_scale.
    """

    samples = False
    measure = "score: entropy of the next patch's code"
    codes, code_dim, window, head_dim = 64, 16, 2, 32
    step = 0.3  # of the threshold, in standard deviations of the spikes: a batch with all above moves it so far

    def __init__(self, dim: int, compression: float, hidden: int | None = None):
        """hidden: width of the head, a multiple of 32; default about dim / 4."""
        super().__init__(dim, compression)
        hidden = max(dim // 4 // self.head_dim, 1) * self.head_dim if hidden is None else hidden
        if hidden % self.head_dim:
            raise ValueError(f"predictor_dim must be a multiple of {self.head_dim} (its heads' width), got {hidden}")
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, self.codes)
        self.register_buffer("projection", torch.empty(dim, self.code_dim))
        self.register_buffer("codebook", torch.empty(self.codes, self.code_dim))
        self.register_buffer("threshold", torch.empty(()))
        self.register_buffer("spread", torch.empty(()))
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.int64))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        super().init_weights()
        self.norm.reset_parameters()
        for layer in (self.project, self.qkv, self.out):
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.projection)
        nn.init.normal_(self.codebook)
        nn.init.zeros_(self.threshold)  # a number: averages of weights (timm's ModelEmaV3) never leave a nan
        nn.init.ones_(self.spread)
        nn.init.zeros_(self.num_batches_tracked)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Towers of former versions have no num_batches_tracked; before training their threshold was nan."""
        threshold = state_dict.get(f"{prefix}threshold")
        if threshold is not None and f"{prefix}num_batches_tracked" not in state_dict:
            unset = threshold.isnan()
            state_dict[f"{prefix}threshold"] = torch.where(unset, 0.0, threshold)
            state_dict[f"{prefix}num_batches_tracked"] = (~unset).long()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, content: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
        content = content.detach()
        predicted = self._predict(self.norm(content), packing).float()  # [T, codes]
        log_p = predicted.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).detach()
        spike = self._spike(entropy, packing)
        place = packing.place_of_token > 0  # a place lies before each but the first
        loss = None
        if self.training:
            code = self._codes_of(content)
            miss = -log_p[:-1].gather(1, code[1:, None])[:, 0] * place[1:]
            image = packing.image_of_token
            loss = miss.new_zeros(len(packing.lengths)).index_add(0, image[1:], miss)
            loss = loss / packing.lengths_tensor.sub(1).clamp(min=1)
            if torch.is_grad_enabled():
                self._follow(spike, packing)
        return (spike - self.threshold) / self.spread, loss

    def _predict(self, x: Tensor, packing: Packing) -> Tensor:
        """[T, D] → logits [T, codes] of the next token's code, from the tokens up to each."""
        x = self.project(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        x = x + packed_attention(q, k, v, packing, causal=True).flatten(1)
        return self.out(F.gelu(x))

    @torch.no_grad()
    def _codes_of(self, content: Tensor) -> Tensor:
        """[T] int64: nearest code of each token's normalised content."""
        flat = F.normalize(F.layer_norm(content.float(), content.shape[-1:]) @ self.projection.float(), dim=-1)
        return (flat @ F.normalize(self.codebook.float(), dim=-1).T).argmax(-1)

    def _spike(self, entropy: Tensor, packing: Packing) -> Tensor:
        """[T]: entropy above the largest of the `window` places before; an image's first places have fewer before them."""
        place, before = packing.place_of_token, torch.full_like(entropy, -math.inf)
        for back in range(1, self.window + 1):
            earlier = torch.cat([entropy[:1].expand(back), entropy[:-back]])[: len(entropy)]
            before = torch.maximum(before, torch.where(place >= back, earlier, -math.inf))
        # Nothing before the very first: as if the entropy had been the image's mean, no spike and no dip.
        image = packing.image_of_token
        sums = entropy.new_zeros(len(packing.lengths)).index_add(0, image, entropy)
        mean = sums / packing.lengths_tensor
        return entropy - torch.where(place == 0, mean[image], before)

    @torch.no_grad()
    def _follow(self, spike: Tensor, packing: Packing) -> None:
        """Move the threshold towards the one that meets the target rate: a step up where more places of this batch lie above
        it, down where fewer, in proportion (Robbins and Monro, 1951). Ranks move together, by sums over all their places."""
        place = (packing.place_of_token < packing.units_of_token - 1).float()
        above = (spike > self.threshold).float()
        sums = torch.stack([place, spike * place, spike.square() * place, above * place]).sum(1)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        mean, square, above = sums[1:] / sums[0].clamp(min=1)
        spread = (square - mean.square()).clamp(min=1e-12).sqrt()
        rate = min(1 / self.compression, 0.999)
        start = mean + spread * math.sqrt(2) * torch.erfinv(
            torch.tensor(1 - 2 * rate, device=mean.device)
        )  # a normal's
        moved = self.threshold + self.step * spread * (above - rate)
        self.spread.copy_(spread)
        self.threshold.copy_(torch.where(self.num_batches_tracked == 0, start, moved))
        self.num_batches_tracked += 1

    def _apply(self, fn, *args, **kwargs):
        """In half precision the threshold's small steps would round away."""
        super()._apply(fn, *args, **kwargs)
        self.threshold, self.spread = self.threshold.float(), self.spread.float()
        return self

    def unlimited(self, logits: Tensor) -> Tensor:
        if not self.num_batches_tracked:  # untrained: the target rate
            places = (logits > -math.inf).sum(1)
            return ((places + 1) / self.compression - 1).round().clamp(min=0).long()
        return (logits > 0).sum(1)


class UniformBoundaries(BoundaryRule):
    """Even cuts at the target rate. State dict: size_scale."""

    samples = has_loss = False

    def __init__(self, dim: int, compression: float, hidden: int | None = None):
        super().__init__(dim, compression)

    def init_weights(self) -> None:
        nn.init.zeros_(self.size_scale)

    def forward(self, x: Tensor, content: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
        return x.new_zeros(len(x), dtype=torch.float32), None  # no place is better than another

    def unlimited(self, logits: Tensor) -> Tensor:
        units = (logits > -math.inf).sum(1) + 1
        return (units / self.compression).round().clamp(min=1).long() - 1

    def choose(self, logits: Tensor, boundaries: Tensor, over: str = "image") -> Tensor:
        """Segments of equal length, as near as whole units allow; no image needs more of them than another."""
        units = (logits > -math.inf).sum(1, keepdim=True) + 1
        at = torch.arange(logits.shape[1], device=logits.device)
        tokens = torch.minimum(boundaries[:, None] + 1, units)
        return ((at + 1) * tokens // units > at * tokens // units) & (logits > -math.inf)


RULES = {
    "gumbel": GumbelBoundaries,
    "similarity": SimilarityBoundaries,
    "entropy": EntropyBoundaries,
    "uniform": UniformBoundaries,
}
