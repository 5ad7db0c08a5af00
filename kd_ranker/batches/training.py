"""Endless training batches, made in a separate thread ahead of the steps that take them.

The batches of many steps are cut in one pass. If the memory of the devices can hold the needed part
of all requests, the devices cut them from it. Otherwise the host cuts them from files and announces
to the disk the reads of the next pass. The batches are the same either way.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jaxtyping import Array, Float, Int

from kd_ranker.batch import Stage
from kd_ranker.batches import cutting, samplers, sampling
from kd_ranker.batches.cutting import Layout, PackedBatches, Span
from kd_ranker.batches.samplers import SAMPLERS, Scores
from kd_ranker.batches.sampling import BatchConfig, Draw, Slots
from kd_ranker.errors import UserError
from kd_ranker.requests.columns import Columns, Counts, Parts, counting, needed
from kd_ranker.requests.records import Dataset

# How an epoch reads the requests: each in a different random order, or as stored, by time.
ORDERS = ("shuffled", "time")

# Number of steps per draw of random numbers: one call per step would delay the dispatch of steps.
BLOCK = 64
# One thread makes batches ahead; another for the numbers behind them would only take turns with it.
_AS_ASKED = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
_ENDLESS = 2**31  # to anyone who counts steps

# The most bytes of the batches that one pass over the data makes.
_PASS = 2**26
# Number of passes made ahead if they are read from files.
_READ_AHEAD = 2

# The share of the free memory that the requests of the training split may take.
_SHARE_OF_MEMORY = 0.25
# Number of requests for which samples are planned at a time.
_CHUNK = 2**16

# The requests of the batches of consecutive steps, and their uniform random numbers.
_Chance = tuple[Int[np.ndarray, "R steps"], Float[np.ndarray, "R steps kinds"]]


class Needs(NamedTuple):
    """The parts of a batch that its learners need.

    Candidates that did not reach `stage` are left out, unless they were shown or are `logged`. The
    rest of a batch is drawn as if they were kept. Batches hold the candidates with a logged teacher
    probability, and the probabilities of those that reached the stage `logged`; with None they hold
    no probabilities. Without `history`, H is 0.
    """

    stage: Stage = Stage.RETRIEVED
    logged: Stage | None = Stage.RETRIEVED
    history: bool = True


class Share(NamedTuple):
    """The part of each batch that this process makes, out of `parts`; others may make it too."""

    part: int = 0
    parts: int = 1


ALL = Needs()
"""The needs of a learner that uses all data."""


class Devices:
    """The default device of JAX. `training.mapping.DeviceMap` places batches on many."""

    @property
    def share(self) -> Share:
        """The part of each batch that this process makes."""
        return Share()

    def place(self, tree: Any) -> Any:
        """Copy a pytree of the host to all devices."""
        return jax.device_put(tree)

    def shard(self, batch: Any) -> Any:
        """Put a pytree of the host, [requests, ...], on devices, which split the requests."""
        return jax.device_put(batch)

    def map_batches(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Compile function(data, batch), of results of `place` and `shard`."""
        return jax.jit(function)


DEFAULT_DEVICE = Devices()


class BatchIterator(grain.DatasetIterator):
    """An endless iterator over batches: the packed batches of some steps, and one step of these.

    Its position is the number of batches handed out. Batches made ahead do not count, nor does the
    number made at a time. Thus a run that started with the requests in memory may resume without
    them there.
    """

    def __init__(self, passes_from: Callable[[int], Iterator[PackedBatches]], steps: int):
        """Take a number -> the passes from that one; each has the batches of `steps` steps."""
        super().__init__()
        self._passes_from, self._steps = passes_from, steps
        self._made: PackedBatches | None = None
        self.set_state({"taken": 0})

    def __next__(self) -> tuple[PackedBatches, int]:
        batches, span = self.take(1)
        return batches, span.start

    def take(self, most: int) -> tuple[PackedBatches, Span]:
        """The next batches, between one and `most`, and their span in the packed batches."""
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
        """Move to a position; batches are made only when the next one is requested."""
        self._taken = state["taken"]
        self._passes = self._passes_from(self._taken // self._steps)
        self._made = None


def training_batches(
    dataset: Dataset,
    batch: BatchConfig,
    needs: Needs = ALL,
    devices: Devices = DEFAULT_DEVICE,
    copies: int = 1,
    resident: bool | None = None,
) -> BatchIterator:
    """Iterate over training batches without end, packed, on the devices.

    Each epoch has its own draw of candidates. The batches are the same whether the requests stay in
    memory or not. They depend only on `batch`, `needs` and the position (`get_state`, `set_state`).
    A share of them has the same requests and draws as if one process made all.

    Args:
      dataset: the dataset; its split `train` is read, without true probabilities.
      batch: the sizes and the order of batches.
      needs: the parts that batches must hold.
      devices: places batches on the devices and makes them there.
      copies: number of copies of the data that the memory of this machine will hold.
      resident: whether the data is kept on the devices; None decides by its size.

    Raises:
      UserError: the split has fewer requests than there are parts of a batch.
    """
    stored, (part, parts) = dataset.columns["train"], devices.share
    columns = needed(stored, dataset.spec, needs.logged, needs.history)
    if len(columns) < parts:
        raise UserError(
            f"{dataset.directory} has {len(columns)} training requests for {parts} processes"
        )
    logged = needs.logged or Stage.RETRIEVED
    scores = functools.partial(samplers.scores_of, stored, logged)
    slots, draw, chosen = _plan(columns.counts, batch, needs.stage, scores)
    layout = cutting.layout_of(columns.types, slots, logged)
    if resident is None:
        # Each of several processes reads only its own requests and need not hold all.
        resident = parts == 1 and _fits(columns, needs.stage, copies)
    if resident:
        cut = _in_memory(columns, needs.stage, chosen, layout, devices)
    else:
        cut = _in_files(columns, chosen, layout, devices)
    # Nothing below refers to the rows of resident requests, which the host may free.
    announce = None if resident else functools.partial(_announce, columns, needs.stage)
    chance = _chance(len(columns), batch)
    requests = batch.requests // parts
    own = slice(part * requests, (part + 1) * requests)
    steps = _steps(requests, layout)

    @functools.lru_cache(maxsize=2)
    def drawn(number: int) -> Any:
        block, at = divmod(number * steps, BLOCK)
        request, start = (of[own, at : at + steps] for of in chance(block))
        if announce:
            announce(request.ravel())
        return draw(request, start)

    def make(number: int) -> PackedBatches:
        starts = drawn(number)
        if announce:
            drawn(number + 1)  # the disk may fetch it while this one is cut
        return cut(starts)

    def passes_from(number: int) -> Iterator[PackedBatches]:
        passes = grain.MapDataset.range(number, _ENDLESS).map(make).to_iter_dataset(_AS_ASKED)
        ahead = 1 if resident else _READ_AHEAD
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(passes, prefetch_buffer_size=ahead)
        )

    return BatchIterator(passes_from, steps)


def _announce(columns: Columns, stage: Stage, requests: Int[np.ndarray, "n"]) -> None:
    """Announce to the disk the reads of requests, without candidates that cannot count."""
    columns.expect(requests, counting(columns.counts.of(requests), stage))


def _chance(requests: int, batch: BatchConfig) -> Callable[[int], _Chance]:
    """The random numbers of a block of steps, by the block's number."""

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> Int[np.ndarray, "requests"]:
        if batch.order == "time":
            return np.arange(requests)
        return np.random.default_rng((batch.seed, epoch)).permutation(requests)

    def draw(block: int, generator: np.random.Generator) -> _Chance:
        # Places in the endless sequence of epochs.
        of_block = batch.requests * BLOCK
        epochs, places = np.divmod(np.arange(block * of_block, (block + 1) * of_block), requests)
        numbers = [order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return (
            np.concatenate(numbers).reshape(BLOCK, batch.requests).T,
            generator.random((batch.requests, BLOCK, sampling.KINDS)),
        )

    blocks = grain.MapDataset.range(_ENDLESS).seed(batch.seed).random_map(draw)
    return functools.lru_cache(maxsize=2)(blocks.__getitem__)


def _fits(columns: Columns, stage: Stage, copies: int) -> bool:
    """Test if `copies` of the needed data fit in host memory, and one in a device's memory."""
    candidates = int(counting(columns.counts, stage).sum())
    numbers = (len(columns), candidates, int(columns.counts.shown.sum()))
    rows = zip(numbers, columns.parts, strict=True)
    size = sum(number * part.type.itemsize for number, part in rows)
    of_device = jax.local_devices()[0].memory_stats() or {}
    room = of_device.get("bytes_limit", float("inf")) - of_device.get("bytes_in_use", 0)
    free = psutil.virtual_memory().available
    return copies * size <= _SHARE_OF_MEMORY * free and size <= _SHARE_OF_MEMORY * room


def _steps(requests: int, layout: Layout) -> int:
    """The number of steps for which one pass makes the batches."""
    steps = BLOCK
    while steps > 1 and requests * layout.row.itemsize * steps > _PASS:
        steps //= 2
    return steps


def _plan(
    counts: Counts, batch: BatchConfig, stage: Stage, scores: Callable[[int], Scores]
) -> tuple[Slots, Callable[..., Any], Callable[[Any], Draw]]:
    """A way to choose the candidates of the batches of consecutive steps.

    Returns:
      The slots of a request; a function from `_Chance` to a draw, or to a few integers per request;
      and one from these to the draw, on NumPy arrays or on a device.
    """
    chunks = [counts.of(slice(at, at + _CHUNK)) for at in range(0, len(counts.shown), _CHUNK)]
    on_host = SAMPLERS[batch.sampler].function is not samplers.funnel

    def slots_of(chunk: Counts) -> Slots:
        if on_host:
            return samplers.slots_of(chunk, stage, batch)
        return sampling.kinds_of(chunk, stage, batch)[1]

    slots = Slots(*np.max([slots_of(chunk) for chunk in chunks], axis=0).tolist())
    if on_host:
        draw = functools.partial(samplers.draw, counts, batch, stage, scores, slots)
        return slots, draw, lambda drawn: drawn

    def starts(
        request: Int[np.ndarray, "R steps"], start: Float[np.ndarray, "R steps kinds"]
    ) -> Any:
        return sampling.draw(request, start, sampling.kinds_of(counts.of(request), stage, batch)[0])

    return slots, starts, functools.partial(sampling.chosen, slots=slots)


def _in_memory(
    columns: Columns,
    stage: Stage,
    chosen: Callable[[Any], Draw],
    layout: Layout,
    devices: Devices,
) -> Callable[[Any], PackedBatches]:
    """Copy the candidates that can count to the devices, which cut the batches of a draw."""
    _announce(columns, stage, np.arange(len(columns)))
    # Candidates that were shown always count, since they may have labels.
    numbers = counting(columns.counts, stage)
    first_candidate, candidates = columns.candidates.prefixes(numbers)
    first_label, labels = columns.labels.prefixes(columns.counts.shown)
    requests = columns.requests.windows[columns.requests.first]
    first, data = devices.place((
        tuple(of.astype(np.int32) for of in (first_candidate, first_label)),
        Parts(requests, candidates, labels),
    ))  # fmt: skip

    def choose(first: tuple[Any, Any], drawn: Any) -> Draw:
        """The draw, with the numbers of rows in place of its places, 0 for padding."""
        draw = chosen(drawn)
        requests, *places = draw.rows
        numbers = (
            jnp.where(place >= 0, _rows(of, requests)[..., None] + place, 0)
            for of, place in zip(first, places, strict=True)
        )
        return draw._replace(rows=Parts(requests, *numbers))

    def gather(data: Parts, draw: Draw) -> Draw:
        return draw._replace(rows=Parts(*map(_rows, data, draw.rows)))

    # In one program with the computation of the row numbers, XLA on a CPU would repeat that
    # computation for each number that it reads.
    numbered, gathered = devices.map_batches(choose), devices.map_batches(gather)
    packed = devices.map_batches(lambda _, draw: cutting.pack_batches(draw, layout))
    return lambda drawn: packed((), gathered(data, numbered(first, devices.shard(drawn))))


def _rows(rows: Array, which: Int[Array, "*shape"]) -> Array:
    return rows.at[which].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _in_files(
    columns: Columns, chosen: Callable[[Any], Draw], layout: Layout, devices: Devices
) -> Callable[[Any], PackedBatches]:
    """Read only the rows of a draw from the files, and place its batches on the devices."""
    # On a device of this process, compiled: in NumPy it would take longer than all the rest.
    choose = jax.jit(chosen)

    def cut(drawn: Any) -> PackedBatches:
        rows = cutting.read(columns, jax.device_get(choose(drawn)))
        return devices.shard(cutting.pack_batches(rows, layout))

    return cut
