"""Sends the requests of an export's example to its server, and tells how long answers take.

    python load_test.py exported/student --clients 2 --seconds 10

Closed-loop: each client sends its next request when it has the answer to its last, which finds out
how much the server can do. With `--rate` open-loop: so many requests a second are due, and a time
begins when a request was due, so that it includes waiting for the clients and the server.
"""

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np


def bodies_of(export: Path) -> list[bytes]:
    """The requests of the example as a client would send them."""
    with np.load(export / "example.npz") as example:
        fields = {
            name.removeprefix("in."): example[name].tolist()
            for name in example
            if name.startswith("in.") and not name.startswith("in.item.")
        }
    bodies = []
    for values in zip(*fields.values(), strict=True):
        request = dict(zip(fields, values, strict=True))
        bodies.append(json.dumps(request).encode())
    return bodies


async def load(arguments: argparse.Namespace) -> tuple[list[float], Counter[str], float]:
    """The seconds that each answer took, the faults by name, and the seconds in all."""
    bodies = itertools.cycle(bodies_of(arguments.export))
    headers = {"content-type": "application/json"}
    seconds: list[float] = []
    faults: Counter[str] = Counter()
    begin = time.perf_counter()

    def due() -> Iterator[float]:
        for number in range(arguments.requests):
            now = time.perf_counter()
            moment = begin + number / arguments.rate if arguments.rate else now
            if max(moment, now) > begin + arguments.seconds:
                return
            yield moment

    moments = due()  # one for all clients: whoever is free takes the next

    async def client(session: httpx.AsyncClient) -> None:
        for moment in moments:
            await asyncio.sleep(moment - time.perf_counter())
            try:
                answer = await session.post("/rank", content=next(bodies), headers=headers)
                answer.raise_for_status()
            except httpx.HTTPStatusError as error:
                faults[f"status {error.response.status_code}"] += 1
            except httpx.HTTPError as error:
                faults[type(error).__name__] += 1
            else:
                seconds.append(time.perf_counter() - moment)

    async with httpx.AsyncClient(base_url=arguments.url, timeout=10) as session:
        await asyncio.gather(*(client(session) for _ in range(arguments.clients)))
    return seconds, faults, time.perf_counter() - begin


def main() -> int:
    """Prints one line; returns 1 if a request has failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, help="the folder that the server serves")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=2, help="connections at most")
    parser.add_argument("--seconds", type=float, default=10, help="no request begins later")
    parser.add_argument("--requests", type=int, default=100_000, help="nor one beyond these")
    parser.add_argument("--rate", type=float, default=0, help="requests a second, for open-loop")
    arguments = parser.parse_args()
    seconds, faults, total = asyncio.run(load(arguments))
    p50, p99 = np.percentile(1e3 * np.array(seconds), [50, 99]) if seconds else (np.nan, np.nan)
    kind = "open" if arguments.rate else "closed"
    print(
        f"{kind}-loop, {arguments.clients} clients: "
        f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, {len(seconds) / total:.1f} requests a second, "
        f"{faults.total()} errors of {len(seconds) + faults.total()} requests"
        + "".join(f"; {name}: {count}" for name, count in faults.items())
    )
    return 1 if faults or not seconds else 0


if __name__ == "__main__":
    sys.exit(main())
