"""The spatial grouping layer: down-sampling that follows the picture's content (algorithm 1 of the paper).

Output tokens start from a strided convolution and are centroids of a soft clustering of the input tokens:

    L times:  A_up   = softmax over output tokens of  τ k(X_in) q(X_out)ᵀ + B + M_local
              A_down = A_up, each column divided by its sum
              X_out += A_downᵀ v(X_in)
              X_out += MLP(X_out)

k and v are computed once; q, the MLP and the norms are shared by the iterations. B is a learned bias for each displacement of an
input from an output token. M_local lets an input token see the window x window output tokens around its own, which is done
sparsely (assignment.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from llava_drip.towers.senatra.assignment import Assignment, halved, neighbours, to_children


class SpatialGrouping(nn.Module):
    """[B, h, w, dim] → [B, ceil(h / 2), ceil(w / 2), out_dim] and the Assignment."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        grid: tuple[int, int],
        window: int | None = 3,
        iterations: int = 3,
        mlp_ratio: float = 4.0,
    ):
        """
        Args:
            grid: (h, w) of the input tokens that the layer is made for; others are taken too. Only the dense layer's bias
                depends on it.
            window: side of the square of output tokens that an input token sees; None: dense, it sees all.
            iterations: L.
            mlp_ratio: hidden width of the MLP over out_dim.
        """
        super().__init__()
        self.window, self.iterations = window, iterations
        self.norm_in = nn.LayerNorm(dim)
        self.init = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False)
        self.norm_init = nn.LayerNorm(out_dim)
        self.key = nn.Linear(dim, out_dim)
        self.value = nn.Linear(dim, out_dim)
        self.norm_out = nn.LayerNorm(out_dim)
        self.query = nn.Linear(out_dim, out_dim)
        self.log_scale = nn.Parameter(torch.full((1,), out_dim**-0.5).log())  # of τ; not (): FSDP divides no scalar
        sides = (2 * window, 2 * window) if window else bias_sides(grid)
        self.position_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(sides), std=0.02))
        self.norm_mlp = nn.LayerNorm(out_dim)
        self.mlp = Mlp(out_dim, int(out_dim * mlp_ratio))

    def forward(self, x: Tensor) -> tuple[Tensor, Assignment]:
        """x: [B, h, w, dim]."""
        grid = tuple(x.shape[1:3])
        x = self.norm_in(x)
        out = self.norm_init(self.init(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        k, v = (to_children(t) if self.window else t.flatten(1, 2) for t in (self.key(x), self.value(x)))
        bias, there = self._bias(grid), self._children_there(grid, x.device)
        for _ in range(self.iterations):
            assignment = Assignment(self._assign(k, self.query(self.norm_out(out)), bias, there), grid, self.window)
            out = out + assignment.gather(v)
            out = out + self.mlp(self.norm_mlp(out))
        return out, assignment

    def _assign(self, k: Tensor, q: Tensor, bias: Tensor, there: Tensor | None) -> Tensor:
        """A_up. k as Assignment.gather takes its inputs, q [B, ho, wo, D]; bias, there: of _bias, _children_there."""
        # q is the smaller of the two.
        q = q * self.log_scale.exp()
        q = neighbours(q, self.window) if self.window else q.flatten(1, 2).transpose(1, 2)
        up = ((k @ q).float() + bias).softmax(-1)
        return up if there is None else up * there

    def _bias(self, grid: tuple[int, int]) -> Tensor:
        """B + M_local, fp32, in the form of A_up: [ho, wo, 4, window²], -inf for output tokens outside the grid; dense
        [h·w, ho·wo]."""
        table, (ho, wo) = self.position_bias.float(), halved(grid)
        if self.window is None:
            table = resize_bias(table, bias_sides(grid))
            rows, columns = (
                torch.arange(n, device=table.device)[:, None] - 2 * torch.arange(m, device=table.device) + 2 * (m - 1)
                for n, m in zip(grid, (ho, wo))
            )
            return table[rows[:, None, :, None], columns[None, :, None, :]].flatten(2, 3).flatten(0, 1)
        w = self.window
        step = torch.arange(w, device=table.device)
        child = torch.arange(2, device=table.device)[:, None]
        place = child + 2 * (w - 1 - step)  # displacement of a child from the output token `step`, from 0
        bias = table[place[:, None, :, None], place[None, :, None, :]].flatten(2, 3).flatten(0, 1)
        inside = neighbours(table.new_ones(1, ho, wo, 1), w)[0]
        return bias.masked_fill(inside == 0, -torch.inf)  # [4, w²] with [ho, wo, 1, w²]

    def _children_there(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        """[1, ho, wo, 4, 1]: 0 for children beyond an odd side; None where there is none."""
        if self.window is None or not (grid[0] % 2 or grid[1] % 2):
            return None
        return to_children(torch.ones(1, *grid, 1, device=device))

    @torch.no_grad()
    def set_input_size(self, grid: tuple[int, int]) -> None:
        """Make the layer one for another grid of input tokens."""
        if self.window is None:
            self.position_bias = nn.Parameter(
                resize_bias(self.position_bias.float(), bias_sides(grid)).to(self.position_bias.dtype),
                requires_grad=self.position_bias.requires_grad,
            )


def bias_sides(grid: tuple[int, int]) -> tuple[int, int]:
    """Displacements of an input from an output token, down and across, of a dense layer: both ends of each side, halved."""
    return tuple(4 * size - 2 for size in halved(grid))


def resize_bias(table: Tensor, sides: tuple[int, int]) -> Tensor:
    """A dense layer's table of biases for another grid, stretched with the picture."""
    if tuple(table.shape) == tuple(sides):
        return table
    return F.interpolate(table[None, None], sides, mode="bicubic", align_corners=True)[0, 0]
