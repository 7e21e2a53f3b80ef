"""What was found out about data, a config or a checkpoint: lines for the user."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

RARE = 0.01  # share of a set below which a finding is a fact, not a warning


@dataclass
class Findings:
    """Lines for the user, one paragraph each."""

    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, other: "Findings") -> None:
        self.facts += other.facts
        self.warnings += other.warnings
        self.errors += other.errors

    def attempt(self, do: Callable[[], Any]) -> None:
        """Call `do`; if it raises ValueError, the message becomes one of the errors."""
        try:
            do()
        except ValueError as error:
            self.errors += [str(error)] * (str(error) not in self.errors)  # splits may share a file

    def report(self) -> str:
        """Facts and warnings, then the numbers of errors and warnings."""
        lines = [*self.facts, *(f"warning: {warning}" for warning in self.warnings)]
        counts = [f"{len(x)} {name}{'s' * (len(x) > 1)}" for x, name in
                  ((self.errors, "error"), (self.warnings, "warning")) if x]  # fmt: skip
        return "\n".join([*lines, ", ".join(counts) or "all good"])

    def print(self) -> None:
        """The report on stdout, then the errors on stderr, a paragraph each."""
        print(self.report())
        for error in self.errors:
            print(f"error: {error}", file=sys.stderr)

    def raise_or_log(self) -> None:
        """ValueError with the first error, or else log facts and warnings."""
        if self.errors:
            more = f" ({len(self.errors) - 1} more: --check lists all)" if len(self.errors) > 1 else ""
            raise ValueError(self.errors[0] + more)
        for fact in self.facts:
            logger.info("%s", fact)
        for warning in self.warnings:
            logger.warning("warning: %s", warning)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(items: Sequence[str], limit: int) -> list[str]:
    """At most `limit` items, evenly spread."""
    if len(items) <= limit:
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]
