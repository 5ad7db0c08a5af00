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


def mean_loss(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weighted mean of the binary cross entropy, over tasks."""
    values = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    weight = weight.expand_as(values)
    totals = (weight * values).flatten(0, -2).sum(0)
    return (totals / weight.flatten(0, -2).sum(0).clamp(min=1)).mean()


def loss_of(student: Student, logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """The loss on user labels plus that on the teacher's probabilities."""
    user_loss = mean_loss(logits, batch["user_label"], batch["label_weight"])
    distilled = student.scale * logits + student.offset
    return user_loss + mean_loss(distilled, batch["teacher_probability"], batch["teacher_weight"])


def dense_parameters(student: Student) -> list[nn.Parameter]:
    """All parameters but the tables."""
    tables = [student.user_row.weight, student.item_row.weight]
    return [
        parameter
        for parameter in student.parameters()
        if not any(parameter is table for table in tables)
    ]


def trainer(sizes: Sizes, arrays: dict, learning_rate: float = 1e-2) -> Callable[[], None]:
    """A function that takes a step of training each time it is called.

    `arrays` holds NumPy arrays with a row a candidate.
    """
    student = Student(sizes)
    optimizers = [
        torch.optim.SparseAdam(
            [student.user_row.weight, student.item_row.weight], lr=learning_rate
        ),
        torch.optim.Adam(dense_parameters(student), lr=learning_rate),
    ]
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    inputs = [batch[name] for name in ("user_id", "user_features", "item_id", "item_features")]

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(student, student(*inputs), batch).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


class _Rows(nn.Module):
    """The rows of a batch in place of a table: `forward` returns them for any ids."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.empty(0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        del ids
        return self.rows


def careful_trainer(sizes: Sizes, arrays: dict, learning_rate: float = 1e-2) -> Callable[[], None]:
    """The same in the way of this project: Adam on unique rows, which have their moments beside.

    `arrays` holds NumPy arrays with a row a request. Dense parameters have PyTorch's fused Adam.
    """
    b1, b2, epsilon, width = 0.9, 0.999, 1e-8, sizes.width
    student = Student(sizes)
    # Embedding | mean | square | number of updates, of users and of items.
    tables = [
        torch.cat([table.weight.detach(), torch.zeros(len(table.weight), 2 * width + 1)], dim=1)
        for table in (student.user_row, student.item_row)
    ]
    optimizer = torch.optim.Adam(dense_parameters(student), lr=learning_rate, fused=True)
    user_rows, item_rows = _Rows(), _Rows()
    student.user_row, student.item_row = user_rows, item_rows  # type: ignore[assignment]
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    inputs = [batch[name] for name in ("user_id", "user_features", "item_id", "item_features")]

    def updated(rows: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        embedding, mean, square, count = rows.split([width, width, width, 1], dim=1)
        count = count + 1
        mean = torch.lerp(mean, gradient, 1 - b1)
        square = b2 * square + (1 - b2) * gradient * gradient
        deviation = (square / (1 - b2**count)).sqrt() + epsilon
        embedding = embedding - learning_rate * (mean / (1 - b1**count)) / deviation
        return torch.cat([embedding, mean, square, count], dim=1)

    def step() -> None:
        optimizer.zero_grad()
        read = []
        for table, place, name in zip(
            tables, (user_rows, item_rows), ("user_id", "item_id"), strict=True
        ):
            unique, index = torch.unique(batch[name], return_inverse=True)
            rows = table.index_select(0, unique)
            leaf = rows[:, :width].contiguous().requires_grad_()
            place.rows = leaf.index_select(0, index.reshape(-1)).view(*index.shape, width)
            read.append((table, unique, rows, leaf))
        loss_of(student, student(*inputs), batch).backward()
        optimizer.step()
        with torch.no_grad():
            for table, unique, rows, leaf in read:
                assert leaf.grad is not None
                table.index_copy_(0, unique, updated(rows, leaf.grad))

    return step
