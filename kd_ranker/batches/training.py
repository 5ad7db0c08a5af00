"""Endless training batches, made in a thread of their own ahead of the steps that take them.

The batches of many steps are cut in one pass: on the devices from what lies there, where their
memory can hold what counts of all requests; else on the host from what lies in files, while the
disk is told what the next pass will read. They are the same batches.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import grain
import jax
import numpy as np
import psutil
from jaxtyping import Float, Int

from kd_ranker.batch import Stage
from kd_ranker.batches import cutting, sampling
from kd_ranker.batches.cutting import Layout, PackedBatches, Span
from kd_ranker.batches.sampling import Slots
from kd_ranker.errors import UserError
from kd_ranker.requests.columns import (
    Columns,
    Counts,
    counting,
    needed,
    only_counting,
)
from kd_ranker.requests.records import Dataset

# How an epoch reads the requests: each in an order of its own, or as they are stored, by time.
ORDERS = ("shuffled", "time")

# Steps whose randomness is drawn at a time: a call a step would hold up the dispatch of steps.
BLOCK = 64
# One thread makes batches ahead; another for the numbers behind them would only take turns with it.
_AS_ASKED = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
_ENDLESS = 2**31  # to anyone who counts steps

# The most bytes of the batches that are made at a time, in one pass over the data.
_PASS = 2**26
# How many passes are made ahead where they are read from files.
_READ_AHEAD = 2

# How much of the memory that is free the requests of the training split may take.
_SHARE_OF_MEMORY = 0.25
# Requests whose samples are planned at a time.
_CHUNK = 2**16


class BatchConfig(NamedTuple):
    """The sizes and the order of batches, by the keys of `config.batch` or `config.teacher.batch`.

    Attributes:
      requests: requests a batch over all processes.
      candidates: candidates a request.
      passed_share: see `sampling.kinds_of`.
      negative_rate: see `sampling.kinds_of`.
      seed: of the order and of the draws.
      order: one of `ORDERS`.
    """

    requests: int
    candidates: int
    passed_share: float
    negative_rate: float
    seed: int
    order: str = "shuffled"


class Needs(NamedTuple):
    """The parts of a batch that those who learn from it need.

    Attributes:
      stage: what came less far in the funnel is left out, unless it was shown or is `logged`. The
        rest of a batch is drawn as if it were there.
      logged: batches hold the logged teacher probabilities of candidates that came so far in the
        funnel, and what has one; with None they hold none.
      history: whether batches hold the users' histories; if not, H is 0.
    """

    stage: Stage = Stage.RETRIEVED
    logged: Stage | None = Stage.RETRIEVED
    history: bool = True


class Share(NamedTuple):
    """The part of each batch that this process makes, of so many parts; others may make it too."""

    part: int
    parts: int


ALL = Needs()
"""The needs of who can use all that there is."""

ALONE = Share(0, 1)
"""The share of a process that does all the work."""


class Devices(Protocol):
    """The way of batches to the devices; `training.mapping` has some."""

    def place(self, tree: Any, /) -> Any:
        """A pytree of the host -> the same on all devices."""
        ...

    def shard(self, tree: Any, /) -> Any:
        """A pytree of the host, [requests, ...] -> the same, the requests split over devices."""
        ...

    def map_batches(self, function: Callable[[Any, Any], Any], /) -> Callable[[Any, Any], Any]:
        """A function of what `place` and `shard` return -> the same, compiled."""
        ...


class _DefaultDevice(NamedTuple):
    place: Callable[[Any], Any]
    shard: Callable[[Any], Any]
    map_batches: Callable[[Callable[[Any, Any], Any]], Callable[[Any, Any], Any]]


DEFAULT_DEVICE: Devices = _DefaultDevice(jax.device_put, jax.device_put, jax.jit)
"""The one that JAX takes when it is told nothing."""


class _Chance(NamedTuple):
    """The random numbers of the batches of some steps in a row."""

    request: Int[np.ndarray, "R steps"]
    start: Float[np.ndarray, "R steps kinds"]


class _Cutter(NamedTuple):
    """A cutter of the batches of some steps in a row.

    Attributes:
      draw: their chance -> which candidates they hold; the disk is told, where it has to read them.
      cut: what was drawn -> the batches, on the devices.
      ahead: how many passes are made ahead.
    """

    draw: Callable[[_Chance], sampling.Starts]
    cut: Callable[[sampling.Starts], PackedBatches]
    ahead: int


class TrainingBatches(grain.IterDataset):
    """An endless dataset of batches; its position is the number of them that were handed out.

    Each is the packed batches of a few steps and the number of its own among them.

    What is made ahead does not count, nor how many are made at a time: a run that started with the
    requests in memory may go on without that.
    """

    def __init__(self, passes_from: Callable[[int], Iterator[PackedBatches]], steps: int):
        """Takes a number -> the passes from that one on; each has the batches of `steps` steps."""
        super().__init__()
        self._passes_from, self._steps = passes_from, steps

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self._passes_from, self._steps)


class BatchIterator(grain.DatasetIterator):
    """An iterator over `TrainingBatches` that hands out one batch, or several in a row."""

    def __init__(self, passes_from: Callable[[int], Iterator[PackedBatches]], steps: int):
        super().__init__()
        self._passes_from, self._steps = passes_from, steps
        self._made: PackedBatches | None = None
        self.set_state({"taken": 0})

    def __next__(self) -> tuple[PackedBatches, int]:
        batches, span = self.take(1)
        return batches, span.start

    def take(self, most: int) -> tuple[PackedBatches, Span]:
        """The next batches, at least one and at most so many, and where they are among others."""
        if self._made is None:
            self._made = next(self._passes)
        made, start = self._made, self._taken % self._steps
        stop = min(start + most, self._steps)
        if stop == self._steps:
            self._made = None
        self._taken += stop - start
        return made, Span(start, stop)

    def get_state(self) -> dict[str, int]:
        """The position, as `set_state` takes it."""
        return {"taken": self._taken}

    def set_state(self, state: dict[str, int]) -> None:
        """Moves to a position; nothing is made before the next batch is asked for."""
        self._taken = state["taken"]
        self._passes = self._passes_from(self._taken // self._steps)
        self._made = None


def training_batches(
    dataset: Dataset,
    batch: BatchConfig,
    needs: Needs = ALL,
    share: Share = ALONE,
    devices: Devices = DEFAULT_DEVICE,
    copies: int = 1,
    resident: bool | None = None,
) -> TrainingBatches:
    """An endless dataset of training batches, packed, on the devices.

    Each epoch has its own draw of candidates. The batches are the same whether the requests stay in
    memory or not. They follow from `batch`, `needs` and the position (`get_state`, `set_state`)
    alone: a share of them has the requests and the draws that it has where one process makes all.

    Args:
      dataset: the dataset; its split `train` is read, without true probabilities.
      batch: what the config says.
      needs: what the batches must hold.
      share: which of the requests of a batch this process makes.
      devices: what puts and makes batches on the devices.
      copies: how many times the memory of this machine will hold the data.
      resident: whether the data lies on the devices; None decides by its size.

    Raises:
      UserError: the split has fewer requests than there are parts of a batch.
    """
    columns = needed(dataset.columns["train"], needs.logged, needs.history)
    if len(columns) < share.parts:
        raise UserError(
            f"{dataset.directory} has {len(columns)} training requests for {share.parts} processes"
        )
    chance = _chance(len(columns), batch)
    batch = batch._replace(requests=batch.requests // share.parts)
    own = slice(share.part * batch.requests, (share.part + 1) * batch.requests)
    if resident is None:
        # Of several processes, each reads its own requests: none need hold them all.
        resident = share.parts == 1 and _fits(columns, needs.stage, copies)
    steps, cutter = (_in_memory if resident else _in_files)(columns, batch, needs, devices)

    @functools.lru_cache(maxsize=2)
    def drawn(number: int) -> sampling.Starts:
        block, at = divmod(number * steps, BLOCK)
        return cutter.draw(_Chance(*(of[own, at : at + steps] for of in chance(block))))

    def make(number: int) -> PackedBatches:
        starts = drawn(number)
        if not resident:
            drawn(number + 1)  # which the disk may fetch while this one is cut
        return cutter.cut(starts)

    def passes_from(number: int) -> Iterator[PackedBatches]:
        passes = grain.MapDataset.range(number, _ENDLESS).map(make).to_iter_dataset(_AS_ASKED)
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(passes, prefetch_buffer_size=cutter.ahead)
        )

    return TrainingBatches(passes_from, steps)


def _chance(requests: int, batch: BatchConfig) -> Callable[[int], _Chance]:
    """The random numbers of a block of steps, by the block's number."""
    order = _order(requests, batch)

    def draw(block: int, generator: np.random.Generator) -> _Chance:
        # Places in the endless sequence of epochs.
        of_block = batch.requests * BLOCK
        epochs, places = np.divmod(np.arange(block * of_block, (block + 1) * of_block), requests)
        numbers = np.concatenate(
            [order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        return _Chance(
            numbers.reshape(BLOCK, batch.requests).T,
            generator.random((batch.requests, BLOCK, sampling.KINDS)),
        )

    blocks = grain.MapDataset.range(_ENDLESS).seed(batch.seed).random_map(draw)
    return functools.lru_cache(maxsize=2)(blocks.__getitem__)


def _order(requests: int, batch: BatchConfig) -> Callable[[int], Int[np.ndarray, "requests"]]:
    """The order of the requests in each epoch; see `ORDERS`."""

    @functools.lru_cache(maxsize=2)
    def of_epoch(epoch: int) -> Int[np.ndarray, "requests"]:
        if batch.order == "time":
            return np.arange(requests)
        return np.random.default_rng((batch.seed, epoch)).permutation(requests)

    return of_epoch


def _fits(columns: Columns, stage: Stage, copies: int) -> bool:
    """Tests if what counts of the requests fits in memory, so many times, and in a device's own."""
    number = int(counting(columns.counts, stage).sum())
    numbers = (len(columns), number, int(columns.counts.shown.sum()))
    widths = (values.shape[1] for values in columns.values)
    size = sum(4 * rows * width for rows, width in zip(numbers, widths, strict=True))
    of_device = jax.local_devices()[0].memory_stats() or {}
    room = of_device.get("bytes_limit", float("inf")) - of_device.get("bytes_in_use", 0)
    free = psutil.virtual_memory().available
    return copies * size <= _SHARE_OF_MEMORY * free and size <= _SHARE_OF_MEMORY * room


def _steps(batch: BatchConfig, layout: Layout) -> int:
    """The number of steps whose batches are made in one pass."""
    steps = BLOCK
    while steps > 1 and 4 * batch.requests * sum(layout.widths) * steps > _PASS:
        steps //= 2
    return steps


def _kinds(
    counts: Counts, bounds: sampling.Bounds, batch: BatchConfig, stage: Stage
) -> tuple[Int[np.ndarray, "*n columns"], Slots]:
    return sampling.kinds_of(
        counts, bounds, stage, batch.candidates, batch.passed_share, batch.negative_rate
    )


def _in_memory(
    columns: Columns, batch: BatchConfig, needs: Needs, devices: Devices
) -> tuple[int, _Cutter]:
    """Lays what counts of the requests on the devices, which cut the batches from it."""
    columns.expect(np.arange(len(columns)), counting(columns.counts, needs.stage))
    columns = only_counting(columns, needs.stage)
    kinds, slots = _kinds(columns.counts, sampling.bounds_of(columns), batch, needs.stage)
    layout = Layout(columns.spans, slots, needs.logged or Stage.RETRIEVED)
    on_devices = devices.place(columns.values)
    # Three programs, each of which reads what the one before has written, see `cutting.gather`.
    choose = devices.map_batches(lambda _, starts: sampling.chosen(starts, slots))
    gather = devices.map_batches(cutting.gather)
    join = devices.map_batches(lambda _, drawn: cutting.pack_batches(drawn, layout))

    # Neither holds the data of the host, which need not stay there.
    def draw(chance: _Chance) -> sampling.Starts:
        return sampling.draw(*chance, kinds[chance.request])

    def cut(starts: sampling.Starts) -> PackedBatches:
        return join((), gather(on_devices, choose((), devices.shard(starts))))

    return _steps(batch, layout), _Cutter(draw, cut, ahead=1)


def _in_files(
    columns: Columns, batch: BatchConfig, needs: Needs, devices: Devices
) -> tuple[int, _Cutter]:
    """Reads what the batches hold, no more, from the files, and lays them on the devices."""

    def kinds_of(requests: Any) -> tuple[Int[np.ndarray, "*n columns"], Slots]:
        counts = columns.counts.of(requests)
        return _kinds(counts, sampling.within(counts), batch, needs.stage)

    chunks = (slice(at, at + _CHUNK) for at in range(0, len(columns), _CHUNK))
    slots = Slots(*np.max([kinds_of(chunk)[1] for chunk in chunks], axis=0).tolist())
    layout = Layout(columns.spans, slots, needs.logged or Stage.RETRIEVED)
    # On a device of this process, compiled: in NumPy it would take longer than all the rest.
    choose = jax.jit(functools.partial(sampling.chosen, slots=slots))

    def draw(chance: _Chance) -> sampling.Starts:
        kinds, _ = kinds_of(chance.request)
        requests = chance.request.ravel()
        columns.expect(requests, counting(columns.counts.of(requests), needs.stage))
        return sampling.draw(*chance, kinds)

    def cut(starts: sampling.Starts) -> PackedBatches:
        drawn = jax.device_get(choose(starts))
        return devices.shard(cutting.pack_batches(cutting.read(columns, drawn), layout))

    return _steps(batch, layout), _Cutter(draw, cut, _READ_AHEAD)
