"""The model that a Hugging Face folder holds, as its config.json describes it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from copd_megatron.errors import ConfigError
from copd_megatron.hf.companions import read_json, weight_files
from copd_megatron.hf.model_function import check_function
from copd_megatron.model.shape import SUPPORTED_ARCHITECTURES, ModelShape, VisionShape

_CONFIG: Final = "config.json"
_MAX_LAYERS: Final = 10_000
_MAX_EXPERTS: Final = 10_000_000
_MAX_SIZE: Final = 1 << 31
"""Bounds far above every model's. Names of tensors are made for each layer and expert."""
_MAX_NUMBER: Final = 1e30
_TOKENIZER_FILES: Final = ("tokenizer.json", "vocab.json", "tokenizer.model")


def read_model_shape(folder: str | Path, key: str = "model.path") -> ModelShape:
    """Reads ``config.json`` and checks that the folder is a model that can be trained.

    Args:
        folder: Hugging Face folder, relative to the working directory.
        key: setting that named it, for the error message.

    Raises:
        ConfigError: no such folder, no config.json, not Qwen3, a function that the actor does not compute, no
            safetensors weights, no tokenizer.
    """
    path = Path(folder).expanduser()
    where = f"{key}: {folder}"
    if not path.is_dir():
        raise ConfigError(
            f"{where}: no such folder (working directory {Path.cwd()}); it has to be a Hugging Face model "
            f"folder with config.json, safetensors and a tokenizer"
        )
    if (path / ".metadata").is_file():
        raise ConfigError(
            f"{where}: a checkpoint in Megatron's format; a model, a frozen teacher included, starts from a "
            f"Hugging Face folder: copd checkpoint to-hf {folder} {Path(folder).name}_hf, and name that"
        )
    config, architecture = _read_config(path, where)
    check_function(config, architecture, where)
    shape = _shape(config, architecture, where)
    try:
        weight_files(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from error
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(
            f"{where}: no tokenizer; expected one of {', '.join(_TOKENIZER_FILES)} beside config.json "
            f"(AutoTokenizer.save_pretrained writes them)"
        )
    return shape


def read_sizes(folder: str | Path, key: str = "model.path") -> ModelShape:
    """The model that a folder's ``config.json`` describes, whether or not its weights are there, and whether
    or not it can be trained.

    Raises:
        ConfigError: no config.json, or not Qwen3.
    """
    where = f"{key}: {folder}"
    config, architecture = _read_config(Path(folder), where)
    return _shape(config, architecture, where)


def _read_config(folder: Path, where: str) -> tuple[dict[str, Any], str]:
    """What config.json holds, and the supported architecture that it names."""
    try:
        config = read_json(folder, _CONFIG)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {_CONFIG} cannot be read: {error}") from error
    if config is None:
        raise ConfigError(f"{where}: {_CONFIG} is missing; is it a Hugging Face model folder?")
    _check_kinds(config, where)
    architectures = config.get("architectures") or []
    known = [name for name in architectures if name in SUPPORTED_ARCHITECTURES]
    if not known:
        found = ", ".join(map(str, architectures)) or "none named"
        raise ConfigError(
            f"{where}: config.json: architectures is {found}; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return config, known[0]


def _check_kinds(config: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError where a part of config.json is no list of names or no object, but should be."""
    architectures = config.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise ConfigError(
            f"{where}: config.json: architectures is {architectures!r:.80}, expected a list of names"
        )
    sections: list[tuple[str, Any]] = [(key, config.get(key)) for key in ("text_config", "vision_config")]
    for prefix, place in (("", config), ("text_config.", config.get("text_config"))):
        if isinstance(place, Mapping):
            sections += [(prefix + key, place.get(key)) for key in ("rope_parameters", "rope_scaling")]
    for key, value in sections:
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{where}: config.json: {key} is {value!r:.80}, expected an object")


def _shape(config: Mapping[str, Any], architecture: str, where: str) -> ModelShape:
    text = config.get("text_config") or config
    size = _Sizes(text, where)
    heads = size("num_attention_heads")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    vision = config.get("vision_config")
    experts = _expert_settings(text, size, where) if "Moe" in architecture else {}
    section = rope.get("mrope_section") or (24, 20, 20)
    if not isinstance(section, list | tuple) or len(section) != 3:
        raise ConfigError(f"{where}: config.json: mrope_section is {section!r:.80}, expected three numbers")
    if (named := size("num_hidden_layers") * experts.get("num_experts", 1)) > _MAX_EXPERTS:
        raise ConfigError(
            f"{where}: config.json: its layers have {named} experts together, no model has more than "
            f"{_MAX_EXPERTS}"
        )
    return ModelShape(
        architecture=architecture,
        num_layers=size("num_hidden_layers"),
        hidden_size=size("hidden_size"),
        ffn_hidden_size=size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=size("num_key_value_heads", default=heads),
        # Qwen3's head size is a field of its own; transformers takes 128 where config.json lacks it.
        head_dim=size("head_dim", default=128),
        vocab_size=size("vocab_size"),
        max_position_embeddings=size("max_position_embeddings")
        if "max_position_embeddings" in text
        else None,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        rope_theta=_number(rope.get("rope_theta") or text.get("rope_theta", 1e6), "rope_theta", where),
        norm_eps=_number(text.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
        vision=None if vision is None else _vision_shape(vision, where),
        mrope_section=None if vision is None else (section[0], section[1], section[2]),
        image_token_id=config.get("image_token_id"),
        video_token_id=config.get("video_token_id"),
        **experts,
    )


def _number(value: Any, key: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _MAX_NUMBER:
        raise ConfigError(f"{where}: config.json: {key} is {value!r:.80}, expected a positive number")
    return float(value)


def _expert_settings(text: Mapping[str, Any], size: _Sizes, where: str) -> dict[str, Any]:
    """The fields of a mixture of experts."""
    if text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1:
        raise ConfigError(
            f"{where}: config.json: mlp_only_layers or decoder_sparse_step make some layers dense; only "
            "models whose every layer has experts are supported"
        )
    return {
        # transformers 5 writes num_local_experts, earlier versions and the published folders num_experts
        "num_experts": size("num_local_experts" if "num_local_experts" in text else "num_experts"),
        "num_experts_per_token": size("num_experts_per_tok"),
        "expert_ffn_size": size("moe_intermediate_size"),
        "normalize_expert_weights": bool(text.get("norm_topk_prob", False)),
    }


def _vision_shape(config: Mapping[str, Any], where: str) -> VisionShape:
    size = _Sizes(config, where, prefix="vision_config.")
    return VisionShape(
        depth=size("depth"),
        hidden_size=size("hidden_size"),
        ffn_hidden_size=size("intermediate_size"),
        in_channels=size("in_channels", default=3),
        patch_size=size("patch_size"),
        temporal_patch_size=size("temporal_patch_size", default=2),
        spatial_merge_size=size("spatial_merge_size", default=2),
        out_hidden_size=size("out_hidden_size"),
        num_positions=size("num_position_embeddings"),
        num_deepstack=_deepstack(config.get("deepstack_visual_indexes"), where),
    )


def _deepstack(indexes: Any, where: str) -> int:
    if indexes is not None and not isinstance(indexes, list):
        raise ConfigError(
            f"{where}: config.json: vision_config.deepstack_visual_indexes is {indexes!r:.80}, "
            "expected a list"
        )
    return len(indexes or ())


@dataclass(frozen=True)
class _Sizes:
    """Reads positive whole numbers of a config.json, with errors that name them."""

    config: Mapping[str, Any]
    where: str
    prefix: str = ""

    def __call__(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"{self.where}: config.json: {self.prefix}{key} is {value!r:.80}, "
                "expected a positive whole number"
            )
        most = _MAX_LAYERS if key in ("num_hidden_layers", "depth") else _MAX_SIZE
        if value > most:
            raise ConfigError(
                f"{self.where}: config.json: {self.prefix}{key} is {value!r:.80}, "
                f"no model has more than {most}"
            )
        return value
