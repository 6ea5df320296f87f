"""Small models that the tests share: one whose rows divide evenly over the ranks, one where nothing
does."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks (one unit each under ``ModuleWrapPolicy({Block})``) and a head that belongs to the
    root unit."""

    def __init__(self, width: int, hidden: int, classes: int, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(blocks))
        self.head = nn.Linear(width, classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def even_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(8, 16, 4)


def uneven_net(seed: int = 0) -> Net:
    """Prime sizes, and a head with fewer rows (3) than ranks."""
    torch.manual_seed(seed)
    return Net(7, 13, 3)


NETS = {"even": even_net, "uneven": uneven_net}


def batch(net: Net, step: int, rank: int, rows: int = 4) -> torch.Tensor:
    """Rank ``rank``'s part of step ``step``'s batch: (rows, width), the same in every run."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(rows, net.head.in_features, generator=generator)
