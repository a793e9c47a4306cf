"""A model folder's small files: its config and tokenizer, as transformers reads them, and what it would read beyond the folder refused."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlite.errors import ModelError, shown
from qlite.given import MOST_JSON_BYTES, parse_json, read_given, require_regular
from qlite.model.source import HUB_PATTERNS, ModelFiles
from qlite.units import MIB, format_bytes

MOST_TOKENIZER_BYTES = 64 * MIB
"""Of any one of a tokenizer's files: the largest that are known, of 262,144 tokens, have 33 MB."""
READ_BY_TRANSFORMERS = tuple(pattern for pattern in HUB_PATTERNS if pattern != "*.safetensors")


def read_config(files: ModelFiles) -> PreTrainedConfig:
    """Return the architecture that the folder's config.json describes; the weights need not be there.

    Raises:
        ModelError: it cannot be used, or is of a model that transformers does not know by itself.
    """
    require_plain_files(files.folder)
    settings = read_object(files.folder / "config.json")
    _require_known(settings, files)
    refuse_quantised(settings, files)
    try:
        return AutoConfig.from_pretrained(files.folder, local_files_only=True)
    except Exception as error:  # each family has checks of its own, and none for what is no number at all
        raise ModelError(f'base.model: "{files.name}": config.json cannot be used: {one_line(error)}') from error


def folder_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    """Return the folder's tokenizer.

    Raises:
        ModelError: there is none, it cannot be read or needs its own Python code, or it is another model's.
    """
    folder = files.folder
    require_plain_files(folder)
    settings = [read_object(path) if (path := folder / name).is_file() else {} for name in ("config.json", "tokenizer_config.json")]
    config, own = settings
    if config:
        read_config(files)
    _require_own_names(folder, own)
    maps = [each.get("auto_map") for each in settings]
    has_own_code = any(isinstance(each, list) or (isinstance(each, dict) and "AutoTokenizer" in each) for each in maps)
    if has_own_code and not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f'base.model: "{files.name}": its tokenizer needs its own Python code, which qlite never runs; '
            "add a tokenizer.json to the folder"
        )
    # tokenizer.json is complete in itself; AutoTokenizer would ask at the terminal whether to run the code.
    loader = PreTrainedTokenizerFast if has_own_code else AutoTokenizer
    # Paths of the machine that it was saved on (merges_file, vocab_file): nothing outside of the folder is opened.
    elsewhere = {key: None for key, value in own.items() if key.endswith("_file") and not (isinstance(value, str) and is_plain(value))}
    try:
        tokenizer = loader.from_pretrained(folder, local_files_only=True, **elsewhere)
        tokenizer("a")  # some settings, such as a longest length that is no number, are only looked at here
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise ModelError(
            f'base.model: "{files.name}" has no tokenizer that can be read ({one_line(error)}); '
            "put tokenizer.json and tokenizer_config.json beside config.json"
        ) from error
    _require_embedded(tokenizer, config, files)
    return tokenizer


def _require_own_names(folder: Path, own: dict) -> None:
    """Raise ModelError if the tokenizer's settings ``own`` name files that would be opened and lie elsewhere."""
    versions = own.get("fast_tokenizer_files", [])
    if not isinstance(versions, list) or not all(isinstance(name, str) and is_plain(name) for name in versions):
        where = folder / "tokenizer_config.json"
        raise ModelError(f"{where}: fast_tokenizer_files = {shown(json.dumps(versions))} are no plain file names; remove it")
    path = folder / "special_tokens_map.json"
    files = [key for key in read_object(path) if key.endswith("_file")] if path.is_file() else []
    if files:
        raise ModelError(f"{path}: {shown(files[0])} is no special token; remove it")


def _require_embedded(tokenizer: PreTrainedTokenizerBase, config: dict, files: ModelFiles) -> None:
    """Raise ModelError if ``tokenizer`` gives ids for which the embedding that ``config`` describes has no row.

    Tokens that were added to it may lie beyond: Gemma's for images do, and text holds none.
    """
    part = config if "vocab_size" in config else config.get("text_config")
    rows = part.get("vocab_size") if isinstance(part, dict) else None
    if not isinstance(rows, int):
        return
    ends = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    beyond = [f"its {name} token is number {number}" for name, number in ends.items() if number is not None and number >= rows]
    if tokenizer.vocab_size > rows:
        beyond.insert(0, f"its vocabulary has {tokenizer.vocab_size:,} tokens")
    if beyond:
        raise ModelError(
            f'base.model: "{files.name}": the tokenizer is not this model\'s: {beyond[0]}, and config.json has vocab_size = {rows:,}; '
            "take the model's own tokenizer files"
        )


def require_plain_files(folder: Path) -> None:
    """Raise ModelError unless all in ``folder`` that transformers may open is a regular file of it, not larger than it can need to be.

    transformers opens by name what is there, whatever it is: a pipe, a device, a link to anywhere.
    """
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")]):
        if any(fnmatchcase(path.name, pattern) for pattern in READ_BY_TRANSFORMERS):
            _require_plain(path, folder)


def _require_plain(path: Path, folder: Path) -> None:
    try:
        require_regular(path)
        size = path.stat().st_size
    except IsADirectoryError:
        return  # nothing of that name is read
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{folder}: {shown(path.name)} cannot be read ({reason}); put the file itself there, or remove it") from error
    if not is_inside(path, folder):
        place = path.resolve()
        raise ModelError(f"{folder}: {shown(path.name)} is a link to {place} outside the folder; put the file itself there")
    if size > MOST_TOKENIZER_BYTES:
        most = format_bytes(MOST_TOKENIZER_BYTES)
        raise ModelError(f"{folder}: {shown(path.name)} has {format_bytes(size)}, and at most {most} of such a file are read")


def _require_known(config: dict, files: ModelFiles) -> None:
    """Raise ModelError if ``config`` is of a model that transformers has no class for: it would offer to run the model's own code."""
    model_type, where = config.get("model_type"), f'base.model: "{files.name}"'
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        if "auto_map" in config:
            raise ModelError(
                f"{where} (model_type {json.dumps(model_type)}) needs its own Python code, which qlite never runs; "
                "choose a model that transformers supports natively"
            )
        raise ModelError(
            f"{where}: config.json: model_type {json.dumps(model_type)} is unknown to this transformers; "
            "upgrade transformers or choose another base"
        )
    if "configuration_files" in config:
        raise ModelError(f"{where}: config.json: configuration_files sends the reader on to other files, which are not read; remove it")


def refuse_quantised(config: dict, files: ModelFiles) -> None:
    """Raise ModelError if ``config`` says that the weights are in few bits already."""
    settings = config.get("quantization_config")
    if settings is None:
        return
    method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
    raise ModelError(
        f'base.model: "{files.name}" is already quantised (config.json: quant_method "{method}"), which is not supported yet; '
        "name the 16-bit model that it was made from, and qlite quantises it while loading"
    )


def read_object(path: Path, says_once: bool = False) -> dict:
    """Return a JSON file's object, ``says_once``: with no key twice. Raises ModelError if it is missing or holds anything else."""
    try:
        content = parse_json(read_given(path, MOST_JSON_BYTES), says_once)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); the model folder is incomplete") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold one JSON object; download it again")
    return content


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether the real place of ``path`` is in ``folder`` or in the same hub repository's blobs."""
    root = folder.resolve()
    # The hub's cache: models--org--name/snapshots/<commit>/file -> ../../blobs/<hash>
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    return any(path.resolve().is_relative_to(allowed) for allowed in roots)


def is_plain(name: str) -> bool:
    """Return whether ``name`` is that of a file in its folder, on every system."""
    return name == Path(name).name and not set(name) & set("\\:\0") and name not in ("", ".", "..")


def one_line(error: Exception) -> str:
    """Return what ``error`` says, for a message."""
    return shown(" ".join(str(error).split()) or type(error).__name__, 300)
