"""Two small domains of text data."""

from __future__ import annotations

from pathlib import Path

from copd_megatron.data.convert.write import WrittenDomain
from copd_megatron.tiny.tasks.text import Family, write_domain

ARITHMETIC = Family(
    name="chain_sum", settings={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
)
DIVISORS = Family(name="gcd", settings={"min_value": 2, "max_value": 60})


def make_domains(out: Path, *, num_train: int = 48, num_validation: int = 8) -> dict[str, WrittenDomain]:
    """Shards of two small domains, ``alpha`` (sums) and ``beta`` (greatest common divisors)."""
    return {
        name: write_domain(out, name, [family], num_train=num_train, num_validation=num_validation, seed=seed)
        for name, family, seed in (("alpha", ARITHMETIC, 1), ("beta", DIVISORS, 2))
    }
