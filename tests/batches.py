"""Tiny models of all kinds, with batches as their processors make them, and what their movement is in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from step_optim import Movement
from tests import reference
from tests.models import VOCAB, tiny_gemma2, tiny_llama

PICTURE = 60
"""The token that stands for a part of a picture."""

Batch = dict[str, Tensor]

LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
CODER = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


def _tiny(kind: Any, config: Any, seed: int) -> Any:
    """A random model whose weights are large enough to say something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3.0)
    return model.train()


def t5(seed: int = 0, **options: Any) -> Any:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, **options
    )
    return _tiny(transformers.T5ForConditionalGeneration, config, seed)


def bart(seed: int = 0) -> Any:
    """BART adds a constant to what its head returns."""
    config = transformers.BartConfig(vocab_size=VOCAB, max_position_embeddings=32, **CODER)
    model = _tiny(transformers.BartForConditionalGeneration, config, seed)
    model.final_logits_bias += torch.linspace(-1, 1, VOCAB)
    return model


def whisper(seed: int = 0) -> Any:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = transformers.WhisperConfig(
        vocab_size=VOCAB, num_mel_bins=4, max_source_positions=4, max_target_positions=16, **CODER, **ids
    )
    return _tiny(transformers.WhisperForConditionalGeneration, config, seed)


def bert(kind: Any = transformers.BertForMaskedLM, seed: int = 0, **options: Any) -> Any:
    return _tiny(kind, transformers.BertConfig(vocab_size=VOCAB, max_position_embeddings=32, **LAYERS, **options), seed)


def tagger(seed: int = 0, labels: int = 5) -> Any:
    return bert(transformers.BertForTokenClassification, seed, num_labels=labels)


def llava(seed: int = 0) -> Any:
    sight = transformers.CLIPVisionConfig(**{**LAYERS, "num_hidden_layers": 2}, image_size=8, patch_size=4)
    words = transformers.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=1, max_position_embeddings=64, **LAYERS)
    config = transformers.LlavaConfig(
        vision_config=sight, text_config=words, image_token_id=PICTURE, image_token_index=PICTURE, image_seq_length=4
    )
    return _tiny(transformers.LlavaForConditionalGeneration, config, seed)


def qwen2_vl(seed: int = 0) -> Any:
    """The pictures of a batch lie in one tensor of patches, [patches, D], in whatever number."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    config = transformers.Qwen2VLConfig(
        text_config={**LAYERS, **ids, "vocab_size": VOCAB, "num_key_value_heads": 1, "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "patch_size": 2, "mlp_ratio": 2},
        image_token_id=PICTURE,
        video_token_id=59,
        vision_start_token_id=58,
        vision_end_token_id=57,
    )
    return _tiny(transformers.Qwen2VLForConditionalGeneration, config, seed)


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _texts(rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> Batch:
    ids = _padded(rows, 0)
    return {
        "input_ids": ids,
        "attention_mask": _padded([[1] * len(row) for row in rows], 0),
        "labels": _padded(labels, -100),
    }


def answered(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """Prompts with responses, for a causal model."""
    return _texts([[*a, *b] for a, b in rows], [[*[-100] * len(a), *b] for a, b in rows])


def short(labels: list[list[int]], **more: Tensor) -> list[Batch]:
    """One batch of four tokens a row."""
    ids = torch.arange(4).repeat(len(labels), 1)
    return [{"input_ids": ids, "labels": torch.tensor(labels), **more}]


def translated() -> list[Batch]:
    """Texts and what a decoder makes of them; lengths differ on both sides."""
    return [
        _texts([[5, 6, 7, 8], [9, 10]], [[21, 22], [23, 24, 25, 26, 27]]),
        _texts([[11, 12, 13]], [[31, -100, 33]]),
    ]


def spoken() -> list[Batch]:
    """Sound: the features of 8 frames, and a text."""
    sound = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(4))
    return [
        {"input_features": sound[:2], "labels": _padded([[21, 22, 23], [24]], -100)},
        {"input_features": sound[2:], "labels": torch.tensor([[25, 26]])},
    ]


def masked() -> list[Batch]:
    """Texts with holes, which are to be filled."""
    return [
        _texts([[1, 5, 4, 7, 2], [1, 4, 2]], [[-100, -100, 6, -100, -100], [-100, 8, -100]]),
        _texts([[1, 4, 9, 4, 4, 2]], [[-100, 30, -100, 31, 32, -100]]),
    ]


def tagged() -> list[Batch]:
    """A class for each token but the special ones."""
    return [
        _texts([[1, 5, 6, 7, 2], [1, 8, 2]], [[-100, 0, 1, 2, -100], [-100, 3, -100]]),
        _texts([[1, 9, 9, 2]], [[-100, 4, 4, -100]]),
    ]


def seen() -> list[Batch]:
    """Pictures, a question and an answer; the second batch has none."""
    look = [PICTURE] * 4
    pictures = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    first = answered([([1, *look, 5, 6], [21, 22, 23]), ([1, *look, 7], [24])])
    return [{**first, "pixel_values": pictures}, answered([([1, 8, 9], [25, 26])])]


def patched() -> list[Batch]:
    """Pictures of two sizes in one tensor of patches; then one picture alone."""
    patches = torch.randn(16, 24, generator=torch.Generator().manual_seed(6))
    sizes = torch.tensor([[1, 2, 4], [1, 2, 2]])
    first = answered([([58, PICTURE, PICTURE, 57, 5], [21, 22]), ([58, PICTURE, 57, 7, 8], [24])])
    second = answered([([58, PICTURE, 57, 9], [25, 26])])
    for batch in (first, second):
        batch["mm_token_type_ids"] = (batch["input_ids"] == PICTURE).long()
    return [
        {**first, "pixel_values": patches[:12], "image_grid_thw": sizes},
        {**second, "pixel_values": patches[12:], "image_grid_thw": sizes[1:]},
    ]


def told() -> list[Batch]:
    """Texts for a causal model, of which some answers have two parts."""
    second = answered([([11, 12], [25, 26, 27])])
    second["labels"][0, 3] = -100
    return [answered([([5, 6], [21, 22, 23]), ([7, 8, 9], [24])]), second]


def others(batches: Sequence[Batch]) -> list[Batch]:
    """The same questions about other things: other pictures where there are some, other tokens elsewhere."""
    names = ["pixel_values" if "pixel_values" in batch else "input_ids" for batch in batches]
    return [{**batch, name: batch[name] + 11} for name, batch in zip(names, batches, strict=True)]


@dataclass(frozen=True)
class Kind:
    """A model, its batches, how it is read, and whether its logits predict the next label."""

    build: Callable[[int], Any]
    batches: Callable[[], list[Batch]]
    readout: str
    shift: bool


KINDS = {
    "t5": Kind(t5, translated, "hidden", False),
    "t5, untied": Kind(lambda seed: t5(seed, tie_word_embeddings=False), translated, "hidden", False),
    "bart": Kind(bart, translated, "rows", False),
    "whisper": Kind(whisper, spoken, "hidden", False),
    "bert": Kind(lambda seed: bert(seed=seed), masked, "hidden", False),
    "tagger": Kind(tagger, tagged, "full", False),
    "llava": Kind(llava, seen, "hidden", True),
    "llama": Kind(lambda seed: tiny_llama(seed=seed).train(), told, "hidden", True),
    "gemma2": Kind(lambda seed: tiny_gemma2(seed=seed).train(), told, "rows", True),
}
if int(transformers.__version__.partition(".")[0]) >= 5:  # its config has another form before
    KINDS["qwen2-vl"] = Kind(qwen2_vl, patched, "hidden", True)
"""One of each kind: heads that are tied, soft-capped, with a constant, or none at all."""

SLICES = {"first": [0, 2], "second": [1]}
"""Of the three examples that all kinds have; in one of them two batches meet."""


def policy_of(model: nn.Module, batches: Sequence[Batch], *, shift: bool) -> reference.Policy:
    """Evaluate a float64 eval-mode copy, which is given the labels and makes its decoder inputs itself."""
    twin = copy.deepcopy(model).double().eval()
    policy = []
    for batch in batches:
        wide = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
        with torch.no_grad():
            logits = twin(**wide).logits
        for b, labels in enumerate(batch["labels"].tolist()):
            places = [t - shift for t, label in enumerate(labels) if label != -100]
            policy.append([logits[b, t].tolist() for t in places])
    return policy


def movement(kind: Kind, model: nn.Module, previous: reference.Policy, slices: Any) -> Movement:
    """The oracle."""
    return reference.movement(policy_of(model, kind.batches(), shift=kind.shift), previous, slices)
