"""Resampling draws from the policy itself, whatever the model's generation config asks for, and leaves that alone."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from step_optim import ControlSet
from tests.models import ragged_control, tiny_gpt2, tiny_llama

VOCAB = 7
EOS = 5


def policy(**options) -> transformers.LlamaForCausalLM:
    """A small policy over 7 tokens, of which 5 ends a response, with a generation config of its own."""
    model = tiny_llama(vocab=VOCAB)
    model.generation_config = transformers.GenerationConfig(eos_token_id=EOS, pad_token_id=0, **options)
    return model


def prompts(count: int = 6) -> ControlSet:
    """Ragged prompts with something in the place of responses."""
    return ControlSet.from_ids([[1 + i % 4] * (1 + i % 3) for i in range(count)], [[1]] * count)


def drawn(control: ControlSet) -> list[list[int]]:
    """The responses as lists."""
    return [response.tolist() for response in control.responses]


@torch.no_grad()
def ancestral(model: nn.Module, control: ControlSet, tokens: int, temperature: float, seed: int) -> list[list[int]]:
    """Ancestral sampling, written out: softmax(logits / temperature), one whole forward for each token."""
    model = copy.deepcopy(model).eval()
    found = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for prompt in control.prompts:
            text: Tensor = prompt
            while len(text) < len(prompt) + tokens and (len(text) == len(prompt) or text[-1] != EOS):
                logits = model(input_ids=text[None], use_cache=False).logits[0, -1].float()
                token = torch.multinomial(torch.softmax(logits / temperature, -1), 1)
                text = torch.cat([text, token])
            found.append(text[len(prompt) :].tolist())
    return found


NASTY = {
    "beams": {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    "greedy": {"do_sample": False},
    "truncated": {"top_k": 1, "top_p": 0.1, "min_p": 0.5, "typical_p": 0.2, "epsilon_cutoff": 0.3, "eta_cutoff": 0.3},
    "top_h": {"top_h": 0.2},
    "cold": {"temperature": 0.01},
    "penalties": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "exponential_decay_length_penalty": (1, 9.0)},
    "suppressed": {"suppress_tokens": [1, 2, 3], "begin_suppress_tokens": [EOS], "bad_words_ids": [[4]]},
    "forced": {"forced_bos_token_id": 6, "forced_eos_token_id": 6},
    "bias": {"sequence_bias": [[[4], 30.0]]},
    "short": {"max_length": 4, "max_new_tokens": 1, "max_time": 1e-9},
    "long": {"min_length": 30, "min_new_tokens": 9},
    "stop strings": {"stop_strings": ["what"]},
    "several": {"num_return_sequences": 4, "do_sample": True},
    "dictionaries": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "guidance": {"guidance_scale": 4.0},
    "watermark": {"watermarking_config": {"bias": 30.0, "seeding_scheme": "selfhash"}},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 1},
    "renormalized": {"renormalize_logits": True, "remove_invalid_values": True},
}


@pytest.mark.parametrize("name", NASTY)
def test_options_of_the_model_have_no_effect(name) -> None:
    """The draw equals that of a model without options, bit for bit, and the model's config is the same object after."""
    model = policy(**NASTY[name])
    config, content = model.generation_config, model.generation_config.to_dict()
    found = prompts().resample(model, max_new_tokens=5, seed=3)
    assert drawn(found) == drawn(prompts().resample(policy(), max_new_tokens=5, seed=3))
    assert model.generation_config is config
    assert config.to_dict() == content


@pytest.mark.parametrize("temperature", [1.0, 2, 0.5])
@pytest.mark.parametrize("name", ["beams", "truncated", "penalties", "suppressed"])
def test_the_draw_is_ancestral_sampling(name, temperature) -> None:
    """From the same random numbers a hand-written sampler makes the same responses; some of them end early."""
    model = policy(**NASTY[name])
    found = drawn(prompts().resample(model, max_new_tokens=5, temperature=temperature, seed=1))
    assert found == ancestral(model, prompts(), 5, temperature, seed=1)


def test_the_end_of_sequence_ends_a_response() -> None:
    """Every id in the model's own list ends a response and is kept, also where its config wants long ones."""
    model = policy(min_new_tokens=20)
    model.generation_config.eos_token_id = [EOS, 3]
    responses = drawn(prompts(20).resample(model, max_new_tokens=8))
    ended = [response for response in responses if len(response) < 8]
    assert ended
    assert all(response[-1] in (EOS, 3) for response in ended)
    assert all(token not in (EOS, 3) for response in responses for token in response[:-1])


def test_options_of_the_caller_apply() -> None:
    """What is passed by name, or in a generation config, is done; also in place of sampling."""
    model = policy(suppress_tokens=[1])
    greedy = [response[:1] for response in drawn(prompts().resample(model, max_new_tokens=3, do_sample=False))]
    assert greedy == [response[:1] for response in drawn(prompts().resample(model, max_new_tokens=3, top_k=1))]
    by_config = prompts().resample(model, max_new_tokens=3, generation_config=transformers.GenerationConfig(top_k=1))
    assert greedy == [response[:1] for response in drawn(by_config)]
    kept_out = prompts().resample(model, max_new_tokens=5, suppress_tokens=[2, 3, EOS])
    assert not {2, 3, EOS} & {token for response in drawn(kept_out) for token in response}
    assert all(len(response) == 4 for response in drawn(prompts().resample(model, max_new_tokens=4, eos_token_id=None)))
    beams = prompts().resample(model, max_new_tokens=3, num_beams=3, return_dict_in_generate=True)
    assert all(1 <= len(response) <= 3 for response in drawn(beams))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 3}, r"ids of shape \(3, \d+\) for one prompt.*leave out .*num_return_sequences"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive and finite; .*do_sample=False"),
        ({"temperature": float("nan")}, "temperature=nan must be positive"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_length": 9}, "max_length=9 would count the prompt's tokens; use max_new_tokens"),
        (
            {"generation_config": transformers.GenerationConfig(temperature=0.5)},
            "temperature=0.5; give temperature= as",
        ),
        ({"generation_config": transformers.GenerationConfig(max_new_tokens=5)}, "max_new_tokens=5; give max_new"),
        ({"generation_config": transformers.GenerationConfig(max_length=5)}, "max_length=5 would count"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(options, message) -> None:
    """What makes no sequence a prompt, or stands in two places, is an error with the remedy; the config is put back."""
    model = policy(top_k=3)
    config = model.generation_config
    with pytest.raises(ValueError, match=message):
        prompts().resample(model, **options)
    assert model.generation_config is config


def test_a_result_without_the_prompt_is_refused() -> None:
    """A generate() that returns the response alone, or no tensor, is not cut at the wrong place."""
    model = policy()
    for result, message in (
        (torch.tensor([[6, 6, 6, 6]]), "does not begin with its prompt"),
        (torch.tensor([6, 6]), r"shape \(2,\)"),
        (["four"], r"generate\(\) returned \['four'\]; a tensor of token ids is needed"),
    ):
        model.generate = lambda result=result, **_: result
        with pytest.raises(ValueError, match=message):
            prompts().resample(model)


def test_ids_outside_the_vocabulary_are_refused_before_the_draw() -> None:
    """The first prompt that was made with another tokenizer is named; the model is not run."""
    model = policy()
    model.generate = None
    with pytest.raises(ValueError, match="prompt 1 of the control set has token id 7, outside the vocabulary of 7"):
        ControlSet.from_ids([[6], [7]], [[1], [1]]).resample(model)


def test_an_encoder_is_refused() -> None:
    """A T5 reads its prompt elsewhere: what it says does not follow it."""
    config = transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    with pytest.raises(TypeError, match=r"T5ForConditionalGeneration has an encoder.*use a decoder-only model"):
        prompts().resample(transformers.T5ForConditionalGeneration(config))


@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_adapters(adapter) -> None:
    """Around and inside PEFT no options count, and every module has afterwards what it had before."""
    peft = pytest.importorskip("peft")
    settings = {
        "lora": lambda: peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }[adapter]()

    def adapted(**options) -> nn.Module:
        torch.manual_seed(0)
        return peft.get_peft_model(policy(**options), settings)

    model = adapted(top_k=1, repetition_penalty=9.0, num_beams=2)
    before = [vars(module).get("generation_config", "none") for module in model.modules()]
    found = prompts().resample(model, max_new_tokens=5, seed=2)
    assert all(
        a is vars(module).get("generation_config", "none") for a, module in zip(before, model.modules(), strict=True)
    )
    assert drawn(found) == drawn(prompts().resample(adapted(), max_new_tokens=5, seed=2))


def test_an_interrupted_draw_puts_the_config_back() -> None:
    """Whatever ends the draw, the model has its own generation config afterwards."""

    class Interrupt(BaseException):
        pass

    model = policy(top_k=2)
    config, forward = model.generation_config, model.forward
    calls = iter(range(100))

    def broken(*args, **kwargs):
        if next(calls) == 3:
            raise Interrupt
        return forward(*args, **kwargs)

    model.forward = broken
    with pytest.raises(Interrupt):
        prompts().resample(model, max_new_tokens=5)
    assert model.generation_config is config


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_default_device_does_not_reach_the_draw(make) -> None:
    """Under a default device the same responses are drawn."""
    model = make()
    expected = ragged_control().resample(model, max_new_tokens=4)
    with torch.device("meta"):
        found = ragged_control().resample(model, max_new_tokens=4)
    assert found == expected
    assert found.device == torch.device("cpu")
