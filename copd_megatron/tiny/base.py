"""Makes the Hugging Face folder of a recipe, once, and the shards of its domains."""

from __future__ import annotations

import json
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copd_megatron.tiny.recipe import TextBase, WarmUpSettings, base_digest, data_digest
from copd_megatron.untrusted.json_text import load_file

if TYPE_CHECKING:  # torch and transformers take seconds to import, and a cached model needs neither
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

    from copd_megatron.tiny.shares import Share

logger = logging.getLogger(__name__)

MARKER = "tiny_recipe.json"
"""Written last; holds the digest of everything that determines the folder."""

Progress = Callable[[int, int, float], None]
"""Called as progress(step, num_steps, loss)."""


class TinyBaseError(RuntimeError):
    """The folder cannot be made. The message says which one, why, and what to do."""


def make_data(out: Path, recipe: TextBase) -> bool:
    """Writes the shards ``<out>/<domain>-{train,validation}-NNNNNN.tar``. Returns False if they exist
    already.

    Raises TinyBaseError if ``out`` holds something else, DataError if a family refuses its settings.
    """

    def make(folder: Path) -> dict[str, object]:
        _write_domains(folder, recipe)
        return {"recipe": asdict(recipe)}

    return make_once(out, data_digest(recipe), make)


def make_tiny_base(out: Path, recipe: TextBase, *, seed: int = 1, progress: Progress | None = None) -> bool:
    """Makes the model folder ``out``. Returns False if the same recipe and seed have made it before.

    The same recipe, seed and machine give the same bytes. ``out`` appears only when it is complete.

    Raises TinyBaseError if ``out`` holds something that was not made here.
    """

    def make(folder: Path) -> dict[str, object]:
        losses = _make(folder, recipe, seed, progress)
        return {"seed": seed, "recipe": asdict(recipe), "final_loss": sum(losses[-50:]) / len(losses[-50:])}

    return make_once(out, base_digest(recipe, seed), make)


def make_once(out: Path, digest: str, make: Callable[[Path], dict[str, object]]) -> bool:
    """Fills the folder ``out`` with ``make(folder)``. Returns False if it was made with the same digest
    before.

    ``make`` returns what the marker should record besides the digest and the time it took. ``out`` appears
    only when it is complete.

    Raises TinyBaseError if ``out`` holds something that was not made here.
    """
    if _digest_of(out) == digest:
        return False
    with _new_folder(out) as folder:
        started = time.monotonic()
        details = make(folder)
        marker = {"digest": digest, **details, "seconds": round(time.monotonic() - started, 1)}
        (folder / MARKER).write_text(json.dumps(marker, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return True


def validation_prompts(recipe: TextBase) -> set[str]:
    """The prompts in the validation shards of all domains. The warm-up must not see them."""
    from copd_megatron.data import ShardSet

    prompts: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        _write_domains(Path(folder), recipe)
        shards = ShardSet.open([f"{folder}/*-validation-*.tar"])
        for ref in shards.refs:
            prompt = shards.read(ref).prompt
            assert isinstance(prompt, str)  # write_domain writes plain prompts
            prompts.add(prompt)
    return prompts


def _write_domains(folder: Path, recipe: TextBase) -> None:
    from copd_megatron.tiny.tasks.text import write_domain

    for domain in recipe.domains:
        write_domain(
            folder,
            domain.name,
            [domain.family],
            num_train=recipe.num_train,
            num_validation=recipe.num_validation,
            seed=recipe.data_seed,
        )


def _make(folder: Path, recipe: TextBase, seed: int, progress: Progress | None) -> list[float]:
    from copd_megatron.tiny.shares import in_shares
    from copd_megatron.tiny.tokenizer import build_tokenizer
    from copd_megatron.tiny.warm_up import reproducible, warm_up

    settings = recipe.warm_up
    tokenizer = build_tokenizer(recipe.model.vocab_size)
    with reproducible(seed, recipe.num_threads):
        model = build_model(recipe, tokenizer)

        def train(share: Share) -> list[float]:
            batches = demonstration_batches(recipe, tokenizer, seed=seed)
            return warm_up(
                model,
                ({n: v if n == "normalizer" else v[share.rows] for n, v in b.items()} for b in batches),
                settings,
                report=reports(progress, settings, share),
                share=share,
            )

        losses = in_shares(recipe.num_processes, sum(p.numel() for p in model.parameters()), train)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def reports(
    progress: Progress | None, settings: WarmUpSettings, share: Share
) -> Callable[[int, float], None] | None:
    """What ``warm_up`` is to call after every step: ``progress``, in the first process."""
    if progress is None or share.number:
        return None
    return lambda step, loss: progress(step, settings.num_steps, loss)


def build_model(recipe: TextBase, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A float32 Qwen3 with random weights, from torch's global generator."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    size = asdict(recipe.model)
    config = Qwen3Config(
        **{name: value for name, value in size.items() if name != "rope_theta"},
        rope_parameters={"rope_type": "default", "rope_theta": recipe.model.rope_theta},
        tie_word_embeddings=True,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config).float()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def demonstration_batches(
    recipe: TextBase, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> Iterator[dict[str, Any]]:
    """The warm-up's batches in order: ``input_ids`` and ``labels``, each [batch_size, T], and ``normalizer``.

    Within a window, batches are formed by length and then shuffled. All batches of a window have the same
    normalizer: if each were divided by its own number of tokens, short responses would count for more.
    """
    from copd_megatron.data import encode_prompt
    from copd_megatron.tiny.demonstrations import demonstrations
    from copd_megatron.tiny.warm_up import pad_batch

    settings = recipe.warm_up
    num_windows = -(-settings.num_steps // settings.length_window)
    window_rows = settings.length_window * settings.batch_size
    shown = demonstrations(recipe, num_windows * window_rows, seed=seed, held_out=validation_prompts(recipe))
    rng = random.Random(seed)
    for start in range(0, len(shown), window_rows):
        rows = [
            (
                encode_prompt(tokenizer, item.prompt).tolist(),
                [*tokenizer(item.response)["input_ids"], tokenizer.eos_token_id],
            )
            for item in shown[start : start + window_rows]
        ]
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        starts = list(range(0, window_rows, settings.batch_size))
        rng.shuffle(starts)
        normalizer = sum(len(response) for _, response in rows) / len(starts)
        for first in starts:
            batch = pad_batch(rows[first : first + settings.batch_size], tokenizer.pad_token_id)
            yield {**batch, "normalizer": normalizer}


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that replaces it if the block succeeds, and is removed if it fails."""
    if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise TinyBaseError(
            f"{out} exists without {MARKER}: it was not made here and is left alone. "
            "Remove it or choose another folder."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        yield new
        if out.exists():
            out.rename(old)
        new.rename(out)
    finally:
        shutil.rmtree(scratch)


def _digest_of(folder: Path) -> str | None:
    """The digest in the marker of a finished folder; None without a marker."""
    try:
        return str(load_file(folder / MARKER)["digest"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        raise TinyBaseError(f"{folder / MARKER} is unreadable ({error}). Remove {folder}.") from error
