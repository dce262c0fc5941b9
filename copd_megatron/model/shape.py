"""The base model's shape, from its Hugging Face folder, with json only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copd_megatron.errors import ConfigError

SUPPORTED_ARCHITECTURES = (
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)
_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """Sizes of a Qwen3-VL vision tower."""

    depth: int
    hidden_size: int
    ffn_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_positions: int
    num_deepstack: int
    """Feature maps that are added to the hidden states after the first decoder layers, one each."""

    @property
    def num_parameters(self) -> int:
        """Weights and biases of patch embedding, position embedding, blocks, merger and deepstack mergers."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        merged = hidden * self.spatial_merge_size**2
        patch = (self.in_channels * self.temporal_patch_size * self.patch_size**2 + 1) * hidden
        block = 4 * hidden * (hidden + 1) + 2 * hidden * ffn + ffn + hidden + 4 * hidden
        merger = merged * (merged + 1) + (merged + 1) * self.out_hidden_size
        mergers = (1 + self.num_deepstack) * merger + 2 * hidden + self.num_deepstack * 2 * merged
        return patch + self.num_positions * hidden + self.depth * block + mergers


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes that layout checks and memory estimates need."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    vision: VisionShape | None = None
    """The vision tower; None for a text model."""
    mrope_section: tuple[int, int, int] | None = None
    """Rotary frequencies that turn with time, height and width; None for a text model."""
    image_token_id: int | None = None
    video_token_id: int | None = None
    num_experts: int | None = None
    """Experts of every layer's feed-forward part; None: a dense model."""
    num_experts_per_token: int = 0
    expert_ffn_size: int = 0
    """Feed-forward width of one expert."""
    normalize_expert_weights: bool = True
    """The chosen experts' weights add up to 1."""

    @property
    def decoder_prefix(self) -> str:
        """Of the decoder's tensors in a Hugging Face folder."""
        return "model" if self.vision is None else "model.language_model"

    @property
    def stacks_experts(self) -> bool:
        """A Hugging Face folder holds all experts of a layer in one tensor, each transposed (Qwen3-VL)."""
        return self.num_experts is not None and self.vision is not None

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer: q, k, v, o; gate, up, down (of every expert, and the router); two
        norms and the q and k norms."""
        return self._layer_parameters(self.num_experts)

    @property
    def active_layer_parameters(self) -> int:
        """Of those, the weights that one token meets."""
        return self._layer_parameters(self.num_experts and self.num_experts_per_token)

    def _layer_parameters(self, num_experts: int | None) -> int:
        query = self.num_attention_heads * self.head_dim
        key_value = self.num_query_groups * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * key_value)
        if num_experts is None or self.num_experts is None:
            mlp = 3 * self.hidden_size * self.ffn_hidden_size
        else:
            mlp = self.hidden_size * (3 * num_experts * self.expert_ffn_size + self.num_experts)
        return attention + mlp + 2 * self.hidden_size + 2 * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding; the output layer has as many more unless they are tied."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All weights, shared ones counted once, a vision tower included."""
        embeddings = self.embedding_parameters * (1 if self.tie_word_embeddings else 2)
        vision = 0 if self.vision is None else self.vision.num_parameters
        return self.num_layers * self.layer_parameters + embeddings + self.hidden_size + vision


def read_model_shape(folder: str | Path, key: str = "model.path") -> ModelShape:
    """Reads ``config.json`` and checks that the folder is a model that can be trained.

    Args:
        folder: Hugging Face folder, relative to the working directory.
        key: setting that named it, for the error message.

    Raises:
        ConfigError: no such folder, no config.json, not Qwen3, no safetensors weights, no tokenizer.
    """
    path = Path(folder).expanduser()
    where = f"{key}: {folder}"
    if not path.is_dir():
        raise ConfigError(
            f"{where}: no such folder (working directory {Path.cwd()}); it has to be a Hugging Face model "
            f"folder with config.json, safetensors and a tokenizer"
        )
    shape = read_sizes(path, key)
    _check_weights(path, where)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(
            f"{where}: no tokenizer; expected one of {', '.join(_TOKENIZER_FILES)} beside config.json "
            f"(AutoTokenizer.save_pretrained writes them)"
        )
    return shape


def read_sizes(folder: str | Path, key: str = "model.path") -> ModelShape:
    """The model that a folder's ``config.json`` describes, whether or not its weights are there.

    Raises:
        ConfigError: no config.json, or not Qwen3.
    """
    where = f"{key}: {folder}"
    config = _read_json(Path(folder) / "config.json", where)
    architectures = config.get("architectures") or []
    known = [name for name in architectures if name in SUPPORTED_ARCHITECTURES]
    if not known:
        found = ", ".join(map(str, architectures)) or "none named"
        raise ConfigError(
            f"{where}: config.json: architectures is {found}; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return _shape(config, known[0], where)


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{where}: {path.name} is missing; is it a Hugging Face model folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{where}: {path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: {path.name} holds a {type(content).__name__}, expected an object")
    return content


def _check_weights(path: Path, where: str) -> None:
    """One safetensors file, or an index all of whose files are there."""
    if (path / _WEIGHTS).is_file():
        return
    if not (path / _WEIGHTS_INDEX).is_file():
        raise ConfigError(
            f"{where}: no {_WEIGHTS} and no {_WEIGHTS_INDEX}; other weight formats are not read: save the "
            f"model again with save_pretrained, which writes safetensors"
        )
    weight_map = _read_json(path / _WEIGHTS_INDEX, where).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ConfigError(f"{where}: {_WEIGHTS_INDEX} has no weight_map; copy the model again")
    absent = sorted({name for name in weight_map.values() if not (path / str(name)).is_file()})
    if absent:
        raise ConfigError(
            f"{where}: {len(absent)} weight file(s) of {_WEIGHTS_INDEX} are missing, {absent[0]} the first; "
            f"copy the model again"
        )


def _shape(config: Mapping[str, Any], architecture: str, where: str) -> ModelShape:
    text = config.get("text_config", config)
    size = _Sizes(text, where)
    heads = size("num_attention_heads")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(
            f"{where}: config.json: rope_type is {rope['rope_type']}; scaled rotary embeddings are not "
            "supported, use the model without them"
        )
    vision = config.get("vision_config")
    experts = _expert_settings(text, size, where) if "Moe" in architecture else {}
    if experts and vision is not None and not experts["normalize_expert_weights"]:
        raise ConfigError(
            f"{where}: config.json: text_config.norm_topk_prob is {text.get('norm_topk_prob', 'missing')}; "
            "Qwen3-VL always normalises the weights of the chosen experts and vLLM wants to be told: set it "
            "to true, as the published folders have it"
        )
    section = rope.get("mrope_section") or (24, 20, 20)
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
        tie_word_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta", 1e6)),
        norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        vision=None if vision is None else _vision_shape(vision, where),
        mrope_section=None if vision is None else (section[0], section[1], section[2]),
        image_token_id=config.get("image_token_id"),
        video_token_id=config.get("video_token_id"),
        **experts,
    )


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
        num_deepstack=len(config.get("deepstack_visual_indexes") or ()),
    )


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
                f"{self.where}: config.json: {self.prefix}{key} is {value!r}, "
                "expected a positive whole number"
            )
        return value
