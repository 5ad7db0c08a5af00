"""Endless training batches, made in a separate thread ahead of the steps that take them.

    sample → gather → pack → put

A pass makes the batches of many steps at once. If the memory of the devices can hold the needed
part of all requests, the devices make them from it. Otherwise the host makes them from files and
announces to the disk the reads of the next pass. The batches are the same either way.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
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
from kd_ranker.batches.samplers import SAMPLERS
from kd_ranker.batches.sampling import BatchConfig, Draw, Gathered, Slots, Starts
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


class Needs(NamedTuple):
    """The parts of a batch that its learners need.

    What is left out does not change what is drawn: candidates are drawn first, from all.
    """

    # Candidates of this stage or a later one stay, for a use that needs no logged score: as
    # negatives, for a loss on stages, or to be scored by a live teacher. Others stay if they have a
    # logged score or are drawn with a label.
    stage: Stage = Stage.RETRIEVED
    # Logged scores count for candidates of this stage or a later one (`teacher.stage`); None:
    # batches hold no scores.
    logged: Stage | None = Stage.RETRIEVED
    # Whether batches hold the users' histories; without, H is 0.
    history: bool = True


class Share(NamedTuple):
    """The part of each batch that this process makes, out of `parts`; others may make it too."""

    part: int = 0
    parts: int = 1


ALL = Needs()
"""The needs of a learner that uses all data."""


class Devices:
    """Where batches are made and placed: here, on one device, the default one of JAX.

    `training.mapping.DeviceMap` does the same on many.
    """

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
        self._passes_from = passes_from
        self._steps = steps
        self._made: PackedBatches | None = None
        self.set_state({"taken": 0})

    def __next__(self) -> tuple[PackedBatches, int]:
        batches, span = self.take(1)
        return batches, span.start

    def take(self, most: int) -> tuple[PackedBatches, Span]:
        """Return the next batches, between one and `most`, and their span in the packed batches."""
        if self._made is None:
            self._made = next(self._passes)
        made = self._made
        start = self._taken % self._steps
        stop = min(start + most, self._steps)
        if stop == self._steps:
            self._made = None
        self._taken += stop - start
        return made, Span(start, stop)

    def get_state(self) -> dict[str, int]:
        """Return the position, as `set_state` takes it."""
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
    scores_stage: Stage = Stage.RETRIEVED,
) -> BatchIterator:
    """Iterate over training batches without end, packed, on the devices.

    Each epoch has its own draw of candidates, which depends only on `batch`, `scores_stage` and the
    position (`get_state`, `set_state`). What batches hold of it depends on `needs`. They are the
    same whether the requests stay in memory or not. A share of them has the same requests and draws
    as if one process made all.

    Args:
      dataset: the dataset; its split `train` is read, without true probabilities.
      batch: the sizes and the order of batches.
      needs: the parts that batches must hold.
      devices: places batches on the devices and makes them there.
      copies: number of copies of the data that the memory of this machine will hold.
      resident: whether the data is kept on the devices; None decides by its size.
      scores_stage: a sampler sees the stored scores of candidates of this stage or a later one.

    Raises:
      UserError: the split has fewer requests than there are parts of a batch.
    """
    stored = dataset.columns["train"]
    part, parts = devices.share
    columns = needed(stored, dataset.spec, needs.logged, needs.history)
    if len(columns) < parts:
        raise UserError(
            f"{dataset.directory} has {len(columns)} training requests for {parts} processes; "
            "start fewer processes"
        )
    inputs = samplers.inputs_of(stored, scores_stage)
    draws = _sampling_of(columns.counts, batch, needs.stage, inputs)
    layout = cutting.layout_of(columns.types, draws.slots, needs.logged or Stage.RETRIEVED)
    if resident is None:
        # Each of several processes reads only its own requests and need not hold all.
        resident = parts == 1 and _fits(columns, needs.stage, copies)
    rows: _ResidentRows | _StoredRows
    if resident:
        rows = _ResidentRows(columns, needs.stage, draws, layout, devices)
    else:
        rows = _StoredRows(columns, needs.stage, draws, layout, devices)
    # Nothing below refers to the rows of resident requests, which the host may free.
    requests = batch.requests // parts
    steps = _steps_of_pass(requests, layout)
    chance = _Chance(len(columns), batch)
    part_of_batch = slice(part * requests, (part + 1) * requests)

    @functools.lru_cache(maxsize=2)
    def sample(number: int) -> Any:
        block_index, first_step = divmod(number * steps, BLOCK)
        block = chance.block(block_index)
        span = slice(first_step, first_step + steps)
        drawn = block.requests[part_of_batch, span]
        rows.announce(drawn.ravel())
        return draws.sample(drawn, block.uniform[part_of_batch, span])

    def make(number: int) -> PackedBatches:
        sampled = sample(number)
        if not resident:
            # Announces the next reads, which the disk may do while these batches are made.
            sample(number + 1)
        return rows.batches(sampled)

    def passes_from(number: int) -> Iterator[PackedBatches]:
        passes = grain.MapDataset.range(number, _ENDLESS).map(make).to_iter_dataset(_AS_ASKED)
        ahead = 1 if resident else _READ_AHEAD
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(passes, prefetch_buffer_size=ahead)
        )

    return BatchIterator(passes_from, steps)


def _fits(columns: Columns, stage: Stage, copies: int) -> bool:
    """Test if `copies` of the needed data fit in host memory, and one in a device's memory."""
    types = columns.types
    size = (
        len(columns) * types.requests.itemsize
        + int(counting(columns.counts, stage).sum()) * types.candidates.itemsize
        + int(columns.counts.shown.sum()) * types.labels.itemsize
    )
    stats = jax.local_devices()[0].memory_stats() or {}
    free_on_device = stats.get("bytes_limit", float("inf")) - stats.get("bytes_in_use", 0)
    free_on_host = psutil.virtual_memory().available
    fits_on_host = copies * size <= _SHARE_OF_MEMORY * free_on_host
    return fits_on_host and size <= _SHARE_OF_MEMORY * free_on_device


def _steps_of_pass(requests: int, layout: Layout) -> int:
    """Return the number of steps for which one pass makes the batches."""
    steps = BLOCK
    while steps > 1 and requests * layout.row.itemsize * steps > _PASS:
        steps //= 2
    return steps


# The first stage: sample. Random numbers choose requests, and candidates of each.


class _RandomBlock(NamedTuple):
    """The random part of the batches of `BLOCK` consecutive steps."""

    requests: Int[np.ndarray, "R steps"]
    uniform: Float[np.ndarray, "R steps kinds"]  # numbers in [0, 1)


class _Chance:
    """The random numbers of all steps, a pure function of the block."""

    def __init__(self, requests: int, batch: BatchConfig):
        self._requests = requests
        self._batch = batch
        blocks = grain.MapDataset.range(_ENDLESS).seed(batch.seed).random_map(self._draw)
        self.block = functools.lru_cache(maxsize=2)(blocks.__getitem__)
        self._order = functools.lru_cache(maxsize=2)(self._order_of_epoch)

    def _draw(self, block: int, generator: np.random.Generator) -> _RandomBlock:
        batch = self._batch
        size = batch.requests * BLOCK
        # Places in the endless sequence of epochs.
        places = np.arange(block * size, (block + 1) * size)
        epochs, places_in_epoch = np.divmod(places, self._requests)
        requests = [
            self._order(int(epoch))[places_in_epoch[epochs == epoch]] for epoch in np.unique(epochs)
        ]
        return _RandomBlock(
            requests=np.concatenate(requests).reshape(BLOCK, batch.requests).T,
            uniform=generator.random((batch.requests, BLOCK, sampling.KINDS)),
        )

    def _order_of_epoch(self, epoch: int) -> Int[np.ndarray, "requests"]:
        if self._batch.order == "time":
            return np.arange(self._requests)
        return np.random.default_rng((self._batch.seed, epoch)).permutation(self._requests)


class _FunnelSampling:
    """The sampler `funnel`, in a compiled form: a few integers a request, then arithmetic."""

    def __init__(self, counts: Counts, batch: BatchConfig, stage: Stage):
        self._counts = counts
        self._batch = batch
        self._stage = stage
        self.slots = _enough_slots(
            sampling.kinds_of(chunk, stage, batch)[1] for chunk in _chunks(counts)
        )

    def sample(
        self, requests: Int[np.ndarray, "R steps"], uniform: Float[np.ndarray, "R steps kinds"]
    ) -> Starts:
        """Draw the integers, on the host."""
        kinds, _ = sampling.kinds_of(self._counts.of(requests), self._stage, self._batch)
        return sampling.draw_starts(requests, uniform, kinds)

    def choose(self, sampled: Starts) -> Draw:
        """Compute the draw, on arrays of NumPy or of a device."""
        return sampling.choose_places(sampled, self.slots)


class _HostSampling:
    """Any other sampler: it draws request by request, on the host."""

    def __init__(
        self,
        counts: Counts,
        batch: BatchConfig,
        stage: Stage,
        inputs: samplers.Inputs,
    ):
        self._counts = counts
        self._batch = batch
        self._stage = stage
        self._inputs = inputs
        self.slots = _enough_slots(
            samplers.slots_of(chunk, stage, batch) for chunk in _chunks(counts)
        )

    def sample(
        self, requests: Int[np.ndarray, "R steps"], uniform: Float[np.ndarray, "R steps kinds"]
    ) -> Draw:
        """Draw the candidates."""
        return samplers.draw(
            self._counts, self._inputs, self._batch, self._stage, self.slots, requests, uniform
        )

    def choose(self, sampled: Draw) -> Draw:
        """Return the draw itself."""
        return sampled


_Sampling = _FunnelSampling | _HostSampling


def _sampling_of(
    counts: Counts, batch: BatchConfig, stage: Stage, inputs: samplers.Inputs
) -> _Sampling:
    if SAMPLERS[batch.sampler].function is samplers.funnel:
        return _FunnelSampling(counts, batch, stage)
    return _HostSampling(counts, batch, stage, inputs)


def _chunks(counts: Counts) -> list[Counts]:
    starts = range(0, len(counts.shown), _CHUNK)
    return [counts.of(slice(start, start + _CHUNK)) for start in starts]


def _enough_slots(slots: Iterable[Slots]) -> Slots:
    return Slots(*np.max(list(slots), axis=0).tolist())


# The other stages: gather the rows of the drawn requests and candidates, pack them into one array
# per pass, and put that on the devices.


class _ResidentRows:
    """The rows of all candidates that can count, on the devices, which do all three stages."""

    def __init__(
        self,
        columns: Columns,
        stage: Stage,
        draws: _Sampling,
        layout: Layout,
        devices: Devices,
    ):
        _announce(columns, stage, np.arange(len(columns)))
        # Candidates that were shown always count, since they may have labels.
        numbers = counting(columns.counts, stage)
        first_candidate, candidates = columns.candidates.prefixes(numbers)
        first_label, labels = columns.labels.prefixes(columns.counts.shown)
        requests = columns.requests.windows[columns.requests.first]
        first = _FirstRows(first_candidate.astype(np.int32), first_label.astype(np.int32))
        self._first, self._rows = devices.place((first, Parts(requests, candidates, labels)))
        self._devices = devices

        def number_rows(first: _FirstRows, sampled: Any) -> Draw:
            """Return the draw, with indices in all resident rows, 0 for padding."""
            draw = draws.choose(sampled)
            requests = draw.indices.requests
            indices = Parts(
                requests=requests,
                candidates=_resident_index(first.candidate, requests, draw.indices.candidates),
                labels=_resident_index(first.label, requests, draw.indices.labels),
            )
            return draw._replace(indices=indices)

        def gather(rows: Parts, draw: Draw) -> Gathered:
            gathered = Parts(
                requests=_rows_at(rows.requests, draw.indices.requests),
                candidates=_rows_at(rows.candidates, draw.indices.candidates),
                labels=_rows_at(rows.labels, draw.indices.labels),
            )
            return Gathered(gathered, draw.stage, draw.factor)

        def pack(_: Any, gathered: Gathered) -> PackedBatches:
            return cutting.pack_batches(gathered, layout)

        # In one program with the computation of the row numbers, XLA on a CPU would repeat that
        # computation for each number that it reads.
        self._number_rows = devices.map_batches(number_rows)
        self._gather = devices.map_batches(gather)
        self._pack = devices.map_batches(pack)

    def announce(self, requests: Int[np.ndarray, "n"]) -> None:
        """Do nothing: no rows are read from the disk any more."""

    def batches(self, sampled: Any) -> PackedBatches:
        """Make the batches of what was sampled."""
        on_devices = self._devices.shard(sampled)
        draw = self._number_rows(self._first, on_devices)
        return self._pack((), self._gather(self._rows, draw))


class _FirstRows(NamedTuple):
    """The resident row of the first candidate, and of the first label, of each request."""

    candidate: Int[Array | np.ndarray, "n"]
    label: Int[Array | np.ndarray, "n"]


def _resident_index(
    first: Any, requests: Int[Array, "*R"], index: Int[Array, "*R k"]
) -> Int[Array, "*R k"]:
    """Return the resident rows of entries of requests, 0 for an index of -1, the padding."""
    return jnp.where(index >= 0, _rows_at(first, requests)[..., None] + index, 0)


def _rows_at(rows: Array, which: Int[Array, "*shape"]) -> Array:
    return rows.at[which].get(mode="promise_in_bounds", wrap_negative_indices=False)


class _StoredRows:
    """The rows in the files of the dataset, of which the host reads those of a draw."""

    def __init__(
        self,
        columns: Columns,
        stage: Stage,
        draws: _Sampling,
        layout: Layout,
        devices: Devices,
    ):
        self._columns = columns
        self._stage = stage
        self._layout = layout
        self._devices = devices
        # On a device of this process, compiled: in NumPy it would take longer than all the rest.
        self._choose = jax.jit(draws.choose)

    def announce(self, requests: Int[np.ndarray, "n"]) -> None:
        """Announce to the disk the reads of these requests."""
        _announce(self._columns, self._stage, requests)

    def batches(self, sampled: Any) -> PackedBatches:
        """Make the batches of what was sampled."""
        draw = jax.device_get(self._choose(sampled))
        gathered = cutting.read(self._columns, draw)
        return self._devices.shard(cutting.pack_batches(gathered, self._layout))


def _announce(columns: Columns, stage: Stage, requests: Int[np.ndarray, "n"]) -> None:
    """Announce to the disk the reads of requests, without candidates that cannot count."""
    columns.expect(requests, counting(columns.counts.of(requests), stage))
