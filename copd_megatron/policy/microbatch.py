"""Which rows go to which data-parallel rank, in which micro-batch. Pure.

A micro-batch of ``b`` rows is padded to its longest row ``s``; ``b x s`` stays within the token budget.
Every data-parallel rank gets the same number of micro-batches, because the pipeline schedules and the
collectives inside them run in step.
"""

from __future__ import annotations

from collections.abc import Sequence


def plan_micro_batches(
    lengths: Sequence[int], *, num_ranks: int, budget_tokens: int
) -> list[list[list[int]]]:
    """Assigns rows to ``plan[rank][micro_batch] = [row, ...]``; each row appears exactly once.

    ``lengths`` are row lengths in tokens. A row longer than the budget gets a micro-batch of its own. A
    micro-batch may be empty where there are fewer rows than ranks. Deterministic, and independent of the
    caller's rank, so that all ranks compute the same plan.

    Raises:
        ValueError: no rows, or a non-positive rank count or budget.
    """
    if num_ranks < 1 or budget_tokens < 1 or not lengths:
        raise ValueError(f"cannot plan {len(lengths)} rows on {num_ranks} ranks at {budget_tokens} tokens")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    for row in order:
        # rows come longest first: the first row of a micro-batch sets its padded length
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    target = -(-len(batches) // num_ranks) * num_ranks
    while len(batches) < target:
        largest = max(range(len(batches)), key=lambda i: (len(batches[i]), -i))
        rows = batches[largest]
        if len(rows) < 2:
            batches.append([])
            continue
        half = -(-len(rows) // 2)
        batches[largest : largest + 1] = [rows[:half], rows[half:]]

    def cost(batch: list[int]) -> int:
        return len(batch) * max((lengths[row] for row in batch), default=0)

    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    per_rank = len(batches) // num_ranks
    for batch in sorted(batches, key=lambda rows: (-cost(rows), rows)):
        rank = min((r for r in range(num_ranks) if len(plan[r]) < per_rank), key=lambda r: (load[r], r))
        plan[rank].append(batch)
        load[rank] += cost(batch)
    return plan
