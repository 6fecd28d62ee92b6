"""A model as a Hugging Face folder: config.json, safetensors files, tokenizer.json. In and out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rattn_eqx.data import files
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel
from rattn_eqx.weights import architectures, own, parameters
from rattn_eqx.weights.architectures import Tensor
from rattn_eqx.weights.foreign import Foreign
from rattn_eqx.weights.safetensors import TensorFile, open_tensors, shards, write_tensors

CONFIG, TENSORS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
LARGEST_TOKENIZER = 2**25  # bytes; of 150,000 pieces it is some 11 MB
MAX_SHARD_BYTES = 5 * 10**9
_LARGEST_INDEX = 2**23


def read(folder: Path | str) -> Foreign:
    """The checkpoint in a Hugging Face folder; each tensor is read when it is asked for.

    Of one safetensors file, or several with an index. Nothing in a file is executed: pickles (.bin, .pt) are not read.

    Raises:
      ValueError: for a folder without such files, and for a file that is not sound; names path and reason.
      OSError: as `open`.
    """
    folder = Path(folder)
    config = files.read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"load: {folder / CONFIG} refused: it must be an object; got {config!r:.80}")
    of_tensor: dict[str, TensorFile] = {}
    for file, names in _tensor_files(folder).items():
        opened = open_tensors(folder / file)
        if names is not None and (different := names ^ opened.entries.keys()):
            raise ValueError(
                f"load: {folder / file} refused: its tensors must be those that {INDEX} says; {min(different)!r:.80} "
                "is in one of the two alone; put back the checkpoint's own files"
            )
        of_tensor |= dict.fromkeys(opened.entries, opened)
    return Foreign(
        folder,
        config,
        {name: file.entries[name].shape for name, file in of_tensor.items()},
        lambda name: of_tensor[name].read(name),
        files.read_text(folder / TOKENIZER, LARGEST_TOKENIZER) if (folder / TOKENIZER).exists() else None,
        _chat_template(folder),
    )


def _tensor_files(folder: Path) -> dict[str, set[str] | None]:
    """The files of tensors, each with the names that the index gives it; None: there is no index."""
    if (folder / TENSORS).exists():
        return {TENSORS: None}
    index = folder / INDEX
    if not index.exists():
        pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        why = f", and {pickles[0]} is a pickle, which is never opened" if pickles else ""
        raise ValueError(
            f"load: {folder} must have {TENSORS} or {INDEX}; it has neither{why}; convert it to safetensors"
        )
    match files.read_json(index, _LARGEST_INDEX):
        case {"weight_map": dict(weight_map)}:
            pass
        case _:
            raise ValueError(f"load: {index} refused: it must have a weight_map; put back the checkpoint's own")
    found: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or {"/", "\\", "\0", ":"} & {*file}:
            raise ValueError(
                f"load: {index} refused: its weight_map must name .safetensors files beside it; got {file!r:.80} for "
                f"{name!r:.80}; put back the checkpoint's own"
            )
        found.setdefault(file, set()).add(name)
    return {**found}


def _chat_template(folder: Path) -> str | None:
    """The template of a file of its own, or of tokenizer_config.json, where it may be one of several."""
    if (folder / TEMPLATE).exists():
        return files.read_text(folder / TEMPLATE)
    path = folder / "tokenizer_config.json"
    match files.read_json(path, LARGEST_TOKENIZER) if path.exists() else None:
        case {"chat_template": str(template)}:
            return template
        case {"chat_template": list(templates)}:
            for entry in templates:
                match entry:
                    case {"name": "default", "template": str(template)}:
                        return template
    return None


def model_of(foreign: Foreign, dtype: str | None = None, compute_dtype: str = "float32") -> LanguageModel:
    """The model of a checkpoint, read one tensor at a time.

    Raises:
      ValueError: for an unknown architecture or setting, a missing or an extra tensor, a wrong shape; names the
        checkpoint and each of them.
    """
    config, read = matched(foreign)
    return parameters.filled(parameters.structure(config, compute_dtype), read, dtype)


def matched(foreign: Foreign) -> tuple[ModelConfig, Callable[[str], np.ndarray]]:
    """The config of a checkpoint's model, and what reads each of its parameters by path.

    Raises: as `model_of`; no tensor is read but a head that stands there although it is tied.
    """
    try:
        config = architectures.model_config(foreign.config)
        return config, _matched(foreign, config)
    except ValueError as error:
        raise ValueError(
            f"load: {foreign.source} refused: {error}; give a checkpoint of a known architecture"
        ) from error


def _matched(foreign: Foreign, config: ModelConfig) -> Callable[[str], np.ndarray]:
    if config.num_layers > len(foreign.shapes):  # before a table of as many layers as are claimed
        raise ValueError(
            f"it must have tensors for {config.num_layers:,} layers; it has {len(foreign.shapes):,} tensors in all"
        )
    table = architectures.tensors(config)
    present = {name: shape for name, shape in foreign.shapes.items() if not name.endswith("rotary_emb.inv_freq")}
    head = "lm_head.weight"
    if config.tie_embeddings and head in present:
        embedding = "model.embed_tokens.weight"
        if present.get(embedding) != present.pop(head) or not _equal(foreign.read(embedding), foreign.read(head)):
            raise ValueError(f"{head} must be {embedding}, to which tie_word_embeddings ties it; it is another")
    wrong = [f"{name} is missing" for name in table if name not in present]
    wrong += [f"{name!r:.120} is of no known part" for name in present if name not in table]
    wrong += [
        f"{name} must be {list(tensor.shape)}, and is {list(present[name])}"
        for name, tensor in table.items()
        if name in present and present[name] != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"its tensors must be those of its config: {'; '.join(wrong[:3])}{more}")
    names = {tensor.path: name for name, tensor in table.items()}
    shapes = {path: leaf.shape for path, leaf in parameters.named(parameters.structure(config)).items()}

    def parameter(path: str) -> np.ndarray:
        array = foreign.read(names[path])
        return (array.T if table[names[path]].transposed else array).reshape(shapes[path])

    return parameter


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))


def save(
    model: LanguageModel,
    folder: Path | str,
    config: dict[str, Any] | str,
    *,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model that is one of another library as a Hugging Face folder, whole or not at all.

    Each parameter keeps its dtype: a checkpoint loaded with dtype="stored" (or the one that all its tensors have) comes
    out equal to the bit. Tensors are converted one at a time. Other files of a checkpoint, such as
    generation_config.json, are not written.

    Args:
      folder: must not exist.
      config: the config.json that the model came with, or the name of its architecture, such as "llama".
      tokenizer, chat_template: the texts that it came with.
      max_shard_bytes: of tensors in a file; more are split into several, with an index.

    Raises:
      ValueError: for a model that the config does not describe, such as one with residual branches, and for a folder
        that exists.
      OSError: as `open`, and for a full disk.
    """
    folder = own.require_new(folder)
    if isinstance(config, str):
        config = architectures.foreign_config(config, model.config)
    architectures.require_same(config["model_type"], architectures.model_config(config), model.config)
    leaves, table = parameters.named(model), architectures.tensors(model.config)
    if leaves.keys() != {tensor.path for tensor in table.values()}:
        raise ValueError("save: the model's parameters must be those of its config; it has other parts")
    dtypes = {str(leaf.dtype) for leaf in leaves.values()}
    if len(dtypes) == 1:
        config = config | {"torch_dtype" if "torch_dtype" in config else "dtype": dtypes.pop()}

    def tensor(name: str) -> np.ndarray:
        return _as_stored(np.asarray(leaves[table[name].path]), table[name])

    sizes = {name: leaves[row.path].nbytes for name, row in table.items()}
    parts = shards(sizes.items(), max_shard_bytes)
    names = [TENSORS] if len(parts) == 1 else [_shard_name(i, len(parts)) for i in range(len(parts))]
    with files.new_folder(folder) as unfinished:
        for file, part in zip(names, parts, strict=True):
            write_tensors(unfinished / file, {name: table[name].shape for name in part}, tensor, {"format": "pt"})
        if len(parts) > 1:
            weight_map = {name: file for file, part in zip(names, parts, strict=True) for name in part}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            files.write_json(unfinished / INDEX, index)
        files.write_json(unfinished / CONFIG, config)
        for name, text in ((TOKENIZER, tokenizer), (TEMPLATE, chat_template)):
            if text is not None:
                files.write_text(unfinished / name, text)


def _as_stored(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """A parameter in the layout of Hugging Face."""
    if not tensor.transposed:
        return array.reshape(tensor.shape)
    return array.reshape(tensor.shape[::-1]).T


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"
