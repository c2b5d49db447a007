"""Small random networks: chains built by hand, and models as a user writes them, with the topology drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn

from resnet_paths.core.chain import Block, ResidualChain


@dataclass(frozen=True)
class Plan:
    """What one block is made of: `width` channels out, and which parts it has."""

    width: int
    skip: str  # "identity", "projection" or "none"
    post: bool
    shared_pre: bool


@st.composite
def plans(draw: st.DrawFn, min_blocks: int = 1, max_blocks: int = 7, skips: tuple[str, ...] = ("identity", "none")):
    """(Input width, plans): a skip becomes a projection wherever the width changes."""
    width = start = draw(st.sampled_from([2, 3]))
    blocks = []
    for _ in range(draw(st.integers(min_blocks, max_blocks))):
        wider = draw(st.sampled_from([width, width, 2, 3]))
        skip = draw(st.sampled_from(skips))
        if skip == "identity" and wider != width:
            skip = "projection"
        blocks.append(Plan(wider, skip, draw(st.booleans()), draw(st.booleans())))
        width = wider
    return start, tuple(blocks)


def branch(width_in: int, width_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width_in, 4), nn.Tanh(), nn.Linear(4, width_out))


def random_chain(plan: tuple[int, tuple[Plan, ...]], seed: int = 0) -> ResidualChain:
    """A float64 chain in eval mode, with names and shapes; weights from `seed`."""
    width, blocks = plan
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made, stage = [], 0
        for index, p in enumerate(blocks):
            skips = {"identity": nn.Identity(), "projection": nn.Linear(width, p.width), "none": None}
            stage += int(index > 0 and p.width != width)
            made.append(
                Block(
                    branch(width, p.width),
                    skips[p.skip],
                    pre=nn.Tanh() if p.shared_pre and p.skip == "projection" else None,
                    post=nn.Softplus() if p.post else None,
                    name=f"block{index}",
                    stage=stage,
                    in_shape=(width,),
                    out_shape=(p.width,),
                )
            )
            width = p.width
        chain = ResidualChain(nn.Linear(5, plan[0]), made, nn.Linear(width, 3))
    return chain.double().eval()


class UserBlock(nn.Module):
    """A block as a user writes it, in-place additions and all."""

    def __init__(self, width: int, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.norm = nn.BatchNorm1d(width)
        self.fc1 = nn.Linear(width, 6)
        self.fc2 = nn.Linear(6, plan.width)
        self.shortcut = nn.Linear(width, plan.width) if plan.skip == "projection" else None
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.act(self.norm(x)) if self.plan.shared_pre else x
        out = self.fc2(torch.tanh(self.fc1(shared)))
        out += x if self.shortcut is None else self.shortcut(shared)
        return self.act(out) if self.plan.post else out


class UserModel(nn.Module):
    """A stack of `UserBlock`s between a stem and a head."""

    def __init__(self, plan: tuple[int, tuple[Plan, ...]]) -> None:
        super().__init__()
        width, blocks = plan
        self.stem = nn.Linear(5, width)
        self.blocks = nn.ModuleList()
        for p in blocks:
            self.blocks.append(UserBlock(width, p))
            width = p.width
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.relu(self.norm(x)))


def random_model(plan: tuple[int, tuple[Plan, ...]], seed: int = 0) -> UserModel:
    """A float64 model in eval mode with BatchNorm statistics that are not trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UserModel(plan).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def inputs(batch: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def snapshot(module: nn.Module) -> list:
    """Everything of a module that an edit or a study must not change."""
    state = [(k, v.clone(), id(v)) for k, v in [*module.named_parameters(), *module.named_buffers()]]
    hooks = [
        (
            name,
            m.training,
            dict(m._forward_hooks),
            dict(m._forward_pre_hooks),
            dict(m._backward_hooks),
            list(m._modules),
        )
        for name, m in module.named_modules()
    ]
    grads = [(p.requires_grad, p.grad is None) for p in module.parameters()]
    return [state, hooks, grads]


def assert_same(before: list, after: list) -> None:
    assert before[1:] == after[1:]
    assert [(k, i) for k, _, i in before[0]] == [(k, i) for k, _, i in after[0]]
    for (name, old, _), (_, new, _) in zip(before[0], after[0], strict=True):
        assert torch.equal(old, new), name
