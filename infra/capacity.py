"""What a load costs on AWS and where limits bite: `python infra/capacity.py --rate 5 --seconds 10`; see CAPACITY.md.

A load is steady: so many model calls a second, each so many seconds long, spread evenly over so many keys. `--table`
prints the table that stands in CAPACITY.md.
"""

# ruff: noqa: T201 - its answer is what it prints

from __future__ import annotations

import argparse
import math
import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from anywhere

from shared import books
from shared.keys import time_ordered
from shared.store.base import Hold, VirtualKey
from shared.store.dynamodb import item_of

FUNCTIONS, RESOURCES = (Path(__file__).with_name(name) for name in ("functions.yml", "resources.yml"))
MONTH = 730 * 3600
KB, GB = 1024, 1024**3

# US dollars, us-east-1, list prices without free tiers as of 2026; they differ by region and change: check them.
# https://aws.amazon.com/api-gateway/pricing/ /lambda/pricing/ /dynamodb/pricing/on-demand/ /cloudwatch/pricing/
# /fargate/pricing/ /elasticloadbalancing/pricing/ /ec2/pricing/on-demand/ (data transfer) /vpc/pricing/ (addresses)
EDGE = 3.50e-6  # a request; each further 10 MB of its answer counts as one more
INVOCATION = 0.20e-6
GB_SECOND = 0.0000133334  # arm64
WRITE, READ = 0.625e-6, 0.125e-6  # a request unit, on demand
STORED, RECOVERY = 0.25, 0.20  # a GB and month of table, and of its point-in-time recovery
LOGGED = 0.50 / GB  # a byte
SENT = 0.09 / GB  # a byte to the internet
ALARM, METRIC, DASHBOARD = 0.10, 0.30, 3.00  # a month: a metric watched, a metric of our own, a dashboard
FREE = "ten alarms, ten metrics and three dashboards"  # of an account, for ever
VCPU_HOUR, GB_HOUR = 0.03238, 0.00356  # Fargate, arm64
BALANCER_HOUR, ADDRESS_HOUR = 0.0225 + 0.008, 0.005  # with one unit of capacity; a public IPv4 address

# Default quotas of an account in a region; all but the first two can be raised. New accounts start lower.
ITEM_WRITES = 1000  # units a second of one item (and of one partition)
MOST_OPEN = 1000  # of a key: functions/keyform.py
KEY_OPEN = 100  # of a key, unless said otherwise
CONCURRENCY = 1000  # environments, one for each open call; +1000 in 10 seconds
EDGE_RATE = 10_000  # requests a second, and a burst of 5,000; in some regions 2,500
SECRET_READS, SECRETS_A_READ = 40, 10  # a second, and each reads ten at most; 100 with high throughput enabled
NEW_TABLE = 4000  # write units a second that a table takes before it has seen more; it doubles its peak in 30 minutes

# A request, as measured here (tests/infra/test_capacity.py) or estimated.
WRITES = 2  # of the key's item: admit, settle
ROW_BYTES = 800  # a generation's record, once in the table and once in its index
LOG_BYTES = 2000  # its log line, its metrics, and the platform's three lines
SWEEP_METRICS = 3  # functions/sweep.py
OVERHEAD = 0.1  # seconds before and after the provider's

# The sweep, in seconds of a whole processor, which comes with so much memory; measured here, rounded up for Lambda's.
PROCESSOR = 1769 / 1024  # GB
IDLE_RUN = 0.6  # where nothing is to be done, start included
ROW_READ = 50e-6  # a row added up
READS = 1 + (books.LAG + 3600) / 3600  # of a row: for its sum, and by each hour's check until it is in that


@dataclass(frozen=True)
class Load:
    rate: float
    seconds: float
    keys: int = 1
    answer: float = 100 * KB  # bytes to the caller: about 500 streamed tokens
    memory: float = 1.0  # GB of an environment

    @property
    def open(self) -> float:
        """Calls under way at a time, on average (Little's law)."""
        return self.rate * (self.seconds + OVERHEAD)

    @property
    def units(self) -> int:
        """Write units of the key's item for one call: each write counts all of the item, open requests included."""
        return WRITES * units(key_bytes(math.ceil(self.open / self.keys)))

    @property
    def written(self) -> int:
        return self.units + 2 * units(ROW_BYTES)

    def costs(self) -> dict[str, float]:
        """US dollars per thousand calls, the provider's own price not among them."""
        return {
            "edge": 1000 * EDGE * max(1, math.ceil(self.answer / 10e6)),
            "functions": 1000 * (INVOCATION + GB_SECOND * self.memory * (self.seconds + OVERHEAD)),
            "table": 1000 * WRITE * self.written,
            "logs": 1000 * LOGGED * LOG_BYTES,
            "data out": 1000 * SENT * self.answer,
        }

    def limits(self) -> dict[str, float]:
        """The calls a second at which each limit bites."""
        length = self.seconds + OVERHEAD
        return {
            f"{KEY_OPEN} open calls of a key (its limit unless said otherwise)": self.keys * KEY_OPEN / length,
            f"{ITEM_WRITES} write units a second of a key's item": self.keys * key_ceiling(self.seconds),
            f"{CONCURRENCY} environments of Lambda": CONCURRENCY / length,
            f"{NEW_TABLE} write units a second of a new table": self.table_ceiling(),
            f"{EDGE_RATE} requests a second at API Gateway": EDGE_RATE,
            "the sweep's time, if it is to check all books each hour": books_rate(),
        }

    def table_ceiling(self) -> int:
        """The most calls a second, of this length and by as many keys, that a new table takes."""
        return most(NEW_TABLE, lambda rate: replace(self, rate=rate).written)

    def break_even(self) -> float:
        """Calls a second, around the clock, above which the smallest dependable container is cheaper.

        It has the same table and sends the same data; its logs are the same. It saves edge and functions."""
        costs = self.costs()
        return container() / MONTH / ((costs["edge"] + costs["functions"]) / 1000)


def key_bytes(open_requests: int) -> int:
    """A key's item with all its limits set, by DynamoDB's rules for sizes."""
    now = 1_800_000_000
    holds = {time_ordered(now): Hold(123_456_789, 4321, now, 930)}
    windows = {f"r{now // 60}": 59, f"t{now // 60}": 99_123, f"d{now // 86400}": 4_123_456_789}
    limits: dict[str, Any] = {"rpm": 60, "tpm": 100_000, "daily_budget": 5 * 10**9, "balance": 123_456_789_012}
    key = VirtualKey("abcdefghijkl", "f" * 64, "a service", windows=windows, open=holds, credit=10**12, **limits)
    item = item_of(key)
    each = sum(len(name.encode()) + 1 + value_bytes(hold) for name, hold in item["p"]["M"].items())
    rest = sum(len(name) + value_bytes(value) for name, value in item.items())
    return rest + each * (open_requests - 1)


def value_bytes(value: dict[str, Any]) -> int:
    """https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/CapacityUnitCalculations.html"""
    ((kind, content),) = value.items()
    match kind:
        case "N":
            return math.ceil(len(content.lstrip("-").strip("0") or "0") / 2) + 1
        case "S":
            return len(content.encode())
        case "L":
            return 3 + sum(1 + value_bytes(each) for each in content)
        case "M":
            return 3 + sum(len(name.encode()) + 1 + value_bytes(each) for name, each in content.items())
        case _:
            return 1


def units(size: float) -> int:
    return math.ceil(size / KB)


def key_ceiling(seconds: float) -> int:
    """The most calls a second that one key's item takes; it grows with what is open, so long calls allow fewer."""
    return most(ITEM_WRITES, lambda rate: Load(rate, seconds).units)


def most(limit: int, units_at: Callable[[int], int]) -> int:
    """The most calls a second within a limit of write units; the more there are, the larger the items they write."""
    return bisect_right(range(1, limit + 1), limit, key=lambda rate: rate * units_at(rate))


def books_rate() -> float:
    """Calls a second, of all keys together, whose rows the sweep can sum up and check; summing up alone is less."""
    facts = yaml.safe_load(FUNCTIONS.read_text("utf-8"))["sweep"]
    return facts["timeout"] / 600 * min(1.0, memory_of("sweep") / PROCESSOR) / (ROW_READ * READS)


def starts(secrets: int) -> float:
    """New environments a second that can read their secrets: a burst after quiet makes one for each of its calls."""
    return SECRET_READS / math.ceil(secrets / SECRETS_A_READ)


def container() -> float:
    """US dollars a month: two tasks of half a processor and 1 GB, a balancer, an address for each and its two."""
    return MONTH / 3600 * (2 * (0.5 * VCPU_HOUR + GB_HOUR) + BALANCER_HOUR + 4 * ADDRESS_HOUR)


def idle(stored: float) -> dict[str, float]:
    """US dollars a month of a stage that nobody calls, but for what `watching` is; `stored` is in GB."""
    runs, memory = MONTH / 600, memory_of("sweep")
    length = OVERHEAD + IDLE_RUN * max(1.0, PROCESSOR / memory)
    return {
        "table and its recovery": stored * (STORED + RECOVERY),
        "sweep, every ten minutes": runs * (INVOCATION + GB_SECOND * memory * length + 10 * READ),
        "packages and logs": 0.01,
    }


def watching() -> dict[str, float]:
    """US dollars a month for watching it, where the account's free tier is used up by others."""
    resources = yaml.safe_load(RESOURCES.read_text("utf-8"))["Resources"].values()
    alarms = [each["Properties"] for each in resources if each["Type"] == "AWS::CloudWatch::Alarm"]
    watched = sum(sum("MetricStat" in each for each in alarm.get("Metrics", ())) or 1 for alarm in alarms)
    dashboards = sum(each["Type"] == "AWS::CloudWatch::Dashboard" for each in resources)
    return {
        f"alarms, which watch {watched} metrics": ALARM * watched,
        f"{SWEEP_METRICS} metrics of the sweep's own": METRIC * SWEEP_METRICS,
        "dashboard": DASHBOARD * dashboards,
    }


def memory_of(function: str) -> float:
    return yaml.safe_load(FUNCTIONS.read_text("utf-8"))[function]["memorySize"] / 1024


def table() -> str:
    lines = [
        "| seconds a call | dollars per 1,000 calls | a key's item takes, calls/s | 1,000 environments, calls/s"
        " | a container is cheaper above, calls/s | = open on average |",
        "|---|---|---|---|---|---|",
    ]
    for seconds in (1, 2, 5, 10, 30, 60):
        load = Load(1, seconds, keys=10, memory=memory_of("stream"))
        even = load.break_even()
        lines.append(
            f"| {seconds} | {sum(load.costs().values()):.3f} | {key_ceiling(seconds)}"
            f" | {CONCURRENCY / (seconds + OVERHEAD):.0f} | {even:.2f} | {replace(load, rate=even).open:.1f} |"
        )
    return "\n".join(lines)


def told(load: Load, stored: float, secrets: int) -> str:
    costs = load.costs()
    lines = [f"{load.rate:g} calls/s of {load.seconds:g} s by {load.keys} key(s): {load.open:.0f} open at a time", ""]
    lines += ["US dollars per 1,000 calls, without the provider's own price"]
    lines += [f"  {cost:8.4f}  {what}" for what, cost in costs.items()]
    monthly = sum(costs.values()) / 1000 * load.rate * MONTH
    lines += [f"  {sum(costs.values()):8.4f}  in all: {monthly:,.0f} a month at this rate around the clock", ""]
    lines += ["Where limits bite, in calls/s"]
    for what, most in sorted(load.limits().items(), key=lambda limit: limit[1]):
        lines.append(f"  {most:8.1f}  {what}{'   <- this load is above' if most < load.rate else ''}")
    lines += ["", "Where limits bite in a burst, in new environments a second"]
    lines += [
        f"  {starts(secrets):8.1f}  {SECRET_READS} reads of secrets a second; who must wait does so for some seconds"
    ]
    even = load.break_even()
    lines += ["", f"A container (two small tasks and a balancer: {container():.0f} a month) is cheaper above"]
    lines += [f"  {even:8.2f}  such calls/s around the clock, {replace(load, rate=even).open:.1f} open on average", ""]
    lines += [f"Idle, US dollars a month with {stored:g} GB stored"]
    lines += [f"  {cost:8.4f}  {what}" for what, cost in idle(stored).items()]
    lines += [f"and free within the account's free tier of {FREE}, else"]
    lines += [f"  {cost:8.4f}  {what}" for what, cost in watching().items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python infra/capacity.py", description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--rate", type=float, default=1, help="model calls a second")
    options.add_argument("--seconds", type=float, default=10, help="how long each takes")
    options.add_argument("--keys", type=int, default=1, help="how many keys share them")
    options.add_argument("--kilobytes", type=float, default=100, help="of each answer")
    options.add_argument("--secrets", type=int, default=5, help="how many the stage has: provider keys and the pepper")
    options.add_argument("--stored", type=float, default=1, help="GB in the table")
    options.add_argument("--table", action="store_true", help="the table in CAPACITY.md")
    given = options.parse_args(arguments)
    load = Load(given.rate, given.seconds, given.keys, given.kilobytes * KB, memory_of("stream"))
    print(table() if given.table else told(load, given.stored, given.secrets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
