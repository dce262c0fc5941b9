"""Number formats and machines: which are refused where, and Megatron's own configs built from ours."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from copd_megatron.config import (
    ConfigError,
    FP8Format,
    FP8Recipe,
    OptimizerConfig,
    PrecisionConfig,
    Recompute,
)
from copd_megatron.config.hardware import (
    FP8_TOKEN_MULTIPLE,
    REQUIREMENTS,
    Machine,
    check_machine,
    missing_for,
    supported_recipes,
)
from copd_megatron.config.schema import ParallelConfig, TrainingConfig
from tests.support.actors import make_actor, train
from tests.support.distributed import run_distributed
from tests.support.layouts import Job, run_layouts
from tests.support.models import make_model
from tests.support.policy_runs import mixed_rows
from tests.support.texts import random_texts

HOPPER = Machine(capability=(9, 0), transformer_engine="2.20.2", cuda="13.0")


@pytest.mark.parametrize(
    ("capability", "recipes"),
    [
        (None, []),
        ((8, 0), []),
        ((8, 9), ["delayed", "tensorwise"]),
        ((9, 0), ["delayed", "tensorwise", "blockwise"]),
        ((10, 0), ["delayed", "tensorwise", "mxfp8"]),
        ((10, 3), ["delayed", "tensorwise", "mxfp8"]),
        ((12, 0), ["delayed", "tensorwise"]),
    ],
)
def test_recipes_follow_the_compute_capability(
    capability: tuple[int, int] | None, recipes: list[str]
) -> None:
    machine = Machine(capability=capability, transformer_engine="2.20.2", cuda="13.0")
    assert [recipe.value for recipe in supported_recipes(machine)] == recipes


@pytest.mark.parametrize(
    ("recipe", "machine", "reason"),
    [
        ("blockwise", Machine(capability=None, transformer_engine=None, cuda=None), "no GPU"),
        ("mxfp8", HOPPER, "sm90; it needs sm100"),
        ("delayed", Machine(capability=(8, 0), transformer_engine="2.20.2", cuda="13.0"), "sm80"),
        ("tensorwise", Machine(capability=(9, 0), transformer_engine=None, cuda="13.0"), "no Transformer"),
        (
            "blockwise",
            Machine(capability=(9, 0), transformer_engine="2.2.1", cuda="13.0"),
            "2.2.1; it",
        ),
        (
            "blockwise",
            Machine(capability=(9, 0), transformer_engine="2.20.2", cuda="12.8"),
            "12.8; it",
        ),
    ],
)
def test_a_recipe_the_machine_lacks_is_refused_with_the_reason(
    recipe: str, machine: Machine, reason: str
) -> None:
    assert reason in str(missing_for(FP8Recipe(recipe), machine))
    with pytest.raises(ConfigError, match=r"precision\.fp8: .*Recipes for this machine: "):
        check_machine(PrecisionConfig(fp8=FP8Recipe(recipe)), None, machine, dtype="bfloat16")


def test_versions_are_compared_as_numbers() -> None:
    machine = Machine(capability=(9, 0), transformer_engine="2.10.0+abc", cuda="12.10")
    assert missing_for(FP8Recipe.blockwise, machine) is None


@pytest.mark.parametrize(
    ("precision", "optimizer", "machine", "dtype", "part"),
    [
        (PrecisionConfig(fp8=FP8Recipe.blockwise), None, HOPPER, "float32", "model.dtype float32"),
        (
            PrecisionConfig(),
            OptimizerConfig(cpu_offload_fraction=0.5),
            Machine(capability=None, transformer_engine=None, cuda=None),
            "float32",
            "optimizer.cpu_offload_fraction: 0.5",
        ),
        (
            PrecisionConfig(),
            OptimizerConfig(precision_aware=True),
            Machine(capability=(9, 0), transformer_engine=None, cuda="13.0"),
            "bfloat16",
            "optimizer.precision_aware",
        ),
    ],
)
def test_settings_the_machine_cannot_run_are_refused(
    precision: PrecisionConfig, optimizer: OptimizerConfig | None, machine: Machine, dtype: str, part: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_machine(precision, optimizer, machine, dtype=dtype)
    assert part in str(error.value)
    check_machine(PrecisionConfig(), OptimizerConfig(), machine, dtype=dtype)


def _build_every_config() -> int:
    """Megatron's own configs from every combination of ours that validation lets through; how many."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.transformer import TransformerConfig

    from copd_megatron.policy.megatron.settings import (
        data_parallel_fields,
        optimizer_fields,
        precision_fields,
        recompute_fields,
    )

    count = 0
    for recipe, form, edges, kept, recompute in itertools.product(
        FP8Recipe, FP8Format, (0, 1), (False, True), Recompute
    ):
        if ((edges or kept) and recipe is FP8Recipe.none) or (edges and recipe is FP8Recipe.delayed):
            continue
        precision = PrecisionConfig(
            fp8=recipe,
            fp8_format=form,
            num_bf16_layers_at_start=edges,
            num_bf16_layers_at_end=edges,
            fp8_parameters=kept,
        )
        training = TrainingConfig(
            recompute=recompute, recompute_num_layers=2, overlap_grad_reduce=kept, overlap_param_gather=kept
        )
        transformer = TransformerConfig(
            num_layers=4,
            hidden_size=64,
            num_attention_heads=4,
            bf16=True,
            params_dtype=torch.bfloat16,
            **precision_fields(precision),
            **recompute_fields(training),
        )
        assert (transformer.fp8 is None) == (recipe is FP8Recipe.none)
        assert recipe is FP8Recipe.none or transformer.fp8_recipe == recipe.value
        assert (transformer.recompute_granularity or "none") == recompute.value
        for moments, offload in itertools.product(("float32", "bfloat16", "uint8"), (0.0, 0.5)):
            optimizer = OptimizerConfig(
                precision_aware=moments != "float32",
                moments_dtype=moments,
                main_grads_dtype="float32" if moments == "float32" else "bfloat16",
                cpu_offload_fraction=offload,
            )
            ddp = DistributedDataParallelConfig(**data_parallel_fields(training, precision, optimizer))
            settings = optimizer_fields(optimizer, training, precision, torch.bfloat16)
            assert settings.keys() <= {field.name for field in dataclasses.fields(MegatronOptimizerConfig)}
            assert ddp.overlap_param_gather == settings["overlap_param_gather"] == kept
            if moments == "float32" or HAVE_TE:  # Megatron looks for Transformer Engine's Adam at once
                megatron = MegatronOptimizerConfig(**settings)
                assert ddp.grad_reduce_in_fp32 == (megatron.main_grads_dtype is torch.float32)
                assert megatron.optimizer_cpu_offload == (offload > 0)
                assert megatron.exp_avg_dtype is getattr(torch, moments)
            count += 1
    return count


def test_our_settings_are_fields_that_megatron_knows() -> None:
    """Misspelt or outdated field names, and combinations that Megatron refuses, show here without a GPU."""
    (count,) = run_distributed(_build_every_config, 1, megatron=True)
    assert count > 100


def test_every_recipe_has_its_requirement_and_its_multiple() -> None:
    assert set(REQUIREMENTS) == set(FP8Recipe) - {FP8Recipe.none}
    assert set(FP8_TOKEN_MULTIPLE) == set(FP8Recipe)


def _train(parallel: ParallelConfig, folder: Any, rows: Any, training: TrainingConfig) -> Any:
    actor = make_actor(parallel, folder, training=training, optimizer=OptimizerConfig(lr=1e-2, adam_eps=1e-3))
    steps = train(actor, rows, steps=3)
    actor.finish_update()
    return steps, [p.detach().numpy().copy() for p in actor.model.parameters()]


@pytest.mark.slow
def test_overlap_and_recomputation_change_no_number(tmp_path: Any) -> None:
    folder = make_model(tmp_path / "model", seed=1)
    rows = mixed_rows(folder, random_texts(9, 321, seed=1))
    budget: dict[str, Any] = {"micro_batch_tokens": 128, "max_weight_lag": 1}
    settings = [
        TrainingConfig(**budget),
        TrainingConfig(**budget, overlap_grad_reduce=True),
        TrainingConfig(**budget, overlap_grad_reduce=True, overlap_param_gather=True),
        TrainingConfig(**budget, recompute=Recompute.selective),
        TrainingConfig(**budget, recompute=Recompute.selective, recompute_modules=["core_attn", "mlp"]),
        TrainingConfig(**budget, recompute=Recompute.full, recompute_num_layers=2),
    ]
    plain, *others = run_layouts(_train, [Job(dp=2, args=(folder, rows, s)) for s in settings])
    for ranks in others:
        for (steps, weights), (expected, expected_weights) in zip(ranks, plain, strict=True):
            np.testing.assert_allclose(steps, expected, rtol=1e-6)
            for mine, other in zip(weights, expected_weights, strict=True):
                np.testing.assert_allclose(mine, other, atol=1e-6)
