"""A plain PyTorch version of the multi-interest student in mode shared, to measure against.

Written as such models usually are: a batch is so many rows of one user and one item, embeddings are
sparse, `SparseAdam` updates the tables and `Adam` the rest.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from scripts.benchmarks.sizes import Sizes


class Student(nn.Module):
    """`kd_ranker.models.student.MultiInterest`, one row a candidate."""

    def __init__(self, sizes: Sizes):
        """Builds the layers and the tables."""
        super().__init__()
        self.interests, self.width = sizes.interests, sizes.width
        self.user_row = nn.Embedding(sizes.users, sizes.width, sparse=True)
        self.item_row = nn.Embedding(sizes.items, sizes.width, sparse=True)
        self.user = nn.Sequential(
            nn.Linear(sizes.width + sizes.user_features, sizes.hidden),
            nn.ReLU(),
            nn.Linear(sizes.hidden, sizes.interests * sizes.width),
        )
        self.item = nn.Linear(sizes.item_features, sizes.width)
        self.heads = nn.Linear(2 * sizes.width + sizes.interests, sizes.tasks)
        self.scale = nn.Parameter(torch.ones(sizes.tasks))
        self.offset = nn.Parameter(torch.zeros(sizes.tasks))

    def forward(
        self,
        user_id: torch.Tensor,
        user_features: torch.Tensor,
        item_id: torch.Tensor,
        item_features: torch.Tensor,
    ) -> torch.Tensor:
        """Logits [*shape of item_id, tasks]; item_id is [users] or [users, candidates]."""
        inputs = torch.cat([self.user_row(user_id), user_features], dim=-1)
        users = self.user(inputs).unflatten(-1, (self.interests, self.width))
        items = self.item_row(item_id) + self.item(item_features)
        # One item a user, or several.
        one, many = "re,red->rd", "rne,red->rnd"
        match = torch.einsum("red,rd->re" if items.ndim == 2 else "red,rnd->rne", users, items)
        combined = torch.einsum(one if items.ndim == 2 else many, match.softmax(-1), users)
        return self.heads(torch.cat([combined, items, match], dim=-1))


def trainer(sizes: Sizes, arrays: dict, learning_rate: float = 1e-2) -> Callable[[], None]:
    """A function that takes a step of training each time it is called.

    `arrays` holds NumPy arrays with a row a candidate.
    """
    student = Student(sizes)
    sparse = [student.user_row.weight, student.item_row.weight]
    dense = [
        parameter
        for parameter in student.parameters()
        if not any(parameter is table for table in sparse)
    ]
    optimizers = [
        torch.optim.SparseAdam(sparse, lr=learning_rate),
        torch.optim.Adam(dense, lr=learning_rate),
    ]
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    inputs = [batch[name] for name in ("user_id", "user_features", "item_id", "item_features")]

    def mean_loss(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        values = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        weight = weight.expand_as(values)
        return ((values * weight).sum(0) / weight.sum(0).clamp(min=1)).mean()

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        logits = student(*inputs)
        user_loss = mean_loss(logits, batch["user_label"], batch["label_weight"])
        distilled = student.scale * logits + student.offset
        distill_loss = mean_loss(distilled, batch["teacher_probability"], batch["teacher_weight"])
        (user_loss + distill_loss).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step
