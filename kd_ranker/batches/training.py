"""Endless training batches, made in a thread of their own ahead of the steps that take them.

The requests are read and decoded once, where memory can hold them: then the batches are cut from
them on the devices, those of many steps in one pass. Else each batch is read and cut on the host.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import jax
import numpy as np
import psutil
from jaxtyping import Float, Int

from kd_ranker.batch import Stage
from kd_ranker.batches import cutting, sampling
from kd_ranker.batches.columns import (
    Columns,
    Parts,
    columns_of,
    in_sampling_order,
    joined,
    only_counting,
)
from kd_ranker.batches.cutting import Layout, PackedBatches, Span
from kd_ranker.batches.sampling import Slots
from kd_ranker.errors import UserError
from kd_ranker.requests.records import Dataset, read_split

# How an epoch reads the requests: each in an order of its own, or as they are stored, by time.
ORDERS = ("shuffled", "time")

# Steps whose randomness is drawn at a time: a call a step would hold up the dispatch of steps.
BLOCK = 64
# One thread makes batches ahead; another for the numbers behind them would only take turns with it.
_AS_ASKED = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
_ENDLESS = 2**31  # to anyone who counts steps

# The most bytes of the batches that are made at a time, in one pass over the data.
_PASS = 2**26
# How many batches are made ahead where each is read from disk.
_READ_AHEAD = 4

# How much of the memory that is free the requests of the training split may take.
_SHARE_OF_MEMORY = 0.25
_CHUNK = 512


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
    """This process among those that share the work, and their number."""

    process: int
    processes: int


ALL = Needs()
"""The needs of who can use all that there is."""

ALONE = Share(0, 1)
"""The share of a process that does all the work."""


class Devices(Protocol):
    """The way of batches to the devices; `training.mapping` has some."""

    def replicate(self, tree: Any, /) -> Any:
        """A pytree of the host -> the same on all devices."""
        ...

    def shard(self, tree: Any, /) -> Any:
        """A pytree of the host, [requests, ...] -> the same, the requests split over devices."""
        ...

    def map_batches(self, function: Callable[[Any, Any], Any], /) -> Callable[[Any, Any], Any]:
        """A function of what is replicated and what is split -> the same, compiled."""
        ...


class _DefaultDevice(NamedTuple):
    replicate: Callable[[Any], Any]
    shard: Callable[[Any], Any]
    map_batches: Callable[[Callable[[Any, Any], Any]], Callable[[Any, Any], Any]]


DEFAULT_DEVICE: Devices = _DefaultDevice(jax.device_put, jax.device_put, jax.jit)
"""The one that JAX takes when it is told nothing."""


class _Chance(NamedTuple):
    """The random numbers of the batches of some steps in a row."""

    request: Int[np.ndarray, "R steps"]
    start: Float[np.ndarray, "R steps kinds"]


class _Maker(NamedTuple):
    """A function that makes the batches of a few steps, their number, and the passes ahead."""

    make: Callable[[_Chance], PackedBatches]
    steps: int
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
    memory or not, but for slots that nothing fills. They follow from `batch`, `needs`, `share` and
    the position (`get_state`, `set_state`) alone.

    Args:
      dataset: the dataset; its split `train` is read, without true probabilities.
      batch: what the config says.
      needs: what the batches must hold.
      share: which of the requests are this process's.
      devices: what puts and makes batches on the devices.
      copies: how many times the memory of this machine will hold the data.
      resident: whether the data stays in memory; None decides by its size.

    Raises:
      UserError: the split has fewer requests than processes.
    """
    number = dataset.builder.info.splits["train"].num_examples
    if number < share.processes:
        raise UserError(
            f"{dataset.directory} has {number} training requests for {share.processes} processes"
        )
    batch = batch._replace(requests=batch.requests // share.processes)
    chance = _chance(number, batch, share)
    if resident or (resident is None and _fits(dataset, copies)):
        maker = _in_memory(dataset, number, batch, needs, devices)
    else:
        maker = _from_disk(dataset, batch, needs, devices)

    def make(number: int) -> PackedBatches:
        block, at = divmod(number * maker.steps, BLOCK)
        of_block = chance(block)
        return maker.make(_Chance(*(part[:, at : at + maker.steps] for part in of_block)))

    def passes_from(number: int) -> Iterator[PackedBatches]:
        passes = grain.MapDataset.range(number, _ENDLESS).map(make).to_iter_dataset(_AS_ASKED)
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(passes, prefetch_buffer_size=maker.ahead)
        )

    return TrainingBatches(passes_from, maker.steps)


def _chance(requests: int, batch: BatchConfig, share: Share) -> Callable[[int], _Chance]:
    """The random numbers of a block of steps, by the block's number."""
    order = _order(requests, batch)

    def draw(block: int, generator: np.random.Generator) -> _Chance:
        # This process's places in the endless sequence of epochs, whose remainders are left out.
        of_process, of_block = requests // share.processes, batch.requests * BLOCK
        epochs, places = np.divmod(np.arange(block * of_block, (block + 1) * of_block), of_process)
        places = places * share.processes + share.process
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


def _reader(dataset: Dataset, needs: Needs) -> Callable[[Sequence[int]], Columns]:
    """Builds the function that reads requests of the split `train` by their numbers."""
    records, decode = read_split(dataset, "train", with_true_probability=False)
    spec = dataset.spec if needs.history else dataclasses.replace(dataset.spec, history_length=0)

    def read(numbers: Sequence[int]) -> Columns:
        # All at once, which the record files answer in parallel.
        found = records.__getitems__(list(numbers))  # type: ignore[attr-defined]
        requests = [decode(record) for record in found]
        return only_counting(columns_of(requests, spec, needs.logged), needs.stage)

    return read


def _fits(dataset: Dataset, copies: int) -> bool:
    """Tests if the requests of the split `train` fit in memory, so many times over."""
    records, _ = read_split(dataset, "train", with_true_probability=False)
    # Decoded requests are about as large as their records.
    sizes = [len(records[index]) for index in range(0, len(records), len(records) // 16 + 1)]
    free = psutil.virtual_memory().available
    return copies * float(np.mean(sizes)) * len(records) <= _SHARE_OF_MEMORY * free


def _kinds(
    columns: Columns, positives: Int[np.ndarray, "n"], batch: BatchConfig, needs: Needs
) -> tuple[Int[np.ndarray, "n columns"], Slots]:
    return sampling.kinds_of(
        *(columns, positives, needs.stage, batch.candidates),
        *(batch.passed_share, batch.negative_rate),
    )


def _in_memory(
    dataset: Dataset, number: int, batch: BatchConfig, needs: Needs, devices: Devices
) -> _Maker:
    """Reads all requests and lays them on the devices, which cut the batches from them."""
    read = _reader(dataset, needs)
    chunks = (range(at, min(at + _CHUNK, number)) for at in range(0, number, _CHUNK))
    columns, positives = in_sampling_order(joined([read(chunk) for chunk in chunks]))
    kinds, slots = _kinds(columns, positives, batch, needs)
    layout = Layout(columns.spans, slots)
    cut, steps = _cut_on_devices(columns.rows, layout, batch.requests, devices)
    # This does not hold the data of the host, which need not stay there.
    return _Maker(lambda chance: cut(sampling.draw(*chance, kinds)), steps, ahead=1)


def _cut_on_devices(
    rows: Parts, layout: Layout, requests: int, devices: Devices
) -> tuple[Callable[[sampling.Starts], PackedBatches], int]:
    """Builds the maker that cuts the batches of a few steps in a row on the devices.

    Args:
      rows: those of the requests' columns, on the host.
      layout: of a batch.
      requests: of a batch, over the devices of this process.
      devices: where to cut them.
    """
    steps = BLOCK
    while steps > 1 and 4 * requests * sum(layout.widths) * steps > _PASS:
        steps //= 2
    on_devices = devices.replicate(rows)
    # Three programs, each of which reads what the one before has written, see `cutting.gather`.
    choose = devices.map_batches(lambda _, starts: sampling.chosen(starts, layout.slots))
    gather = devices.map_batches(cutting.gather)
    join = devices.map_batches(lambda _, drawn: cutting.pack_batches(drawn, layout))

    def cut(starts: sampling.Starts) -> PackedBatches:
        return join((), gather(on_devices, choose((), devices.shard(starts))))

    return cut, steps


def _from_disk(dataset: Dataset, batch: BatchConfig, needs: Needs, devices: Devices) -> _Maker:
    """Reads the requests of one batch at a time and cuts it from them on the host."""
    read = _reader(dataset, needs)
    # What the requests of a batch need differs from batch to batch, as shapes must not.
    slots = Slots(*(batch.candidates,) * 3)

    def make(chance: _Chance) -> PackedBatches:
        columns, positives = in_sampling_order(read(chance.request[:, 0].tolist()))
        kinds, _ = _kinds(columns, positives, batch, needs)
        starts = sampling.draw(np.arange(len(columns))[:, None], chance.start, kinds)
        drawn = cutting.gather(columns.rows, sampling.chosen(starts, slots))
        return devices.shard(cutting.pack_batches(drawn, Layout(columns.spans, slots)))

    return _Maker(make, steps=1, ahead=_READ_AHEAD)
