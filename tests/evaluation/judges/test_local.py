"""The judge on this machine: a handmade model of two blocks' worth of arithmetic, and a random one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keeplora.evaluation.judges import JudgeError, Question, Verdict, make_judge

WORDS = ["<pad>", "<unk>", "</s>", "<judge>", '{"score":', "4", "0", "}", "wrong"]
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}{{ '<judge>' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE
RIGHT, WRONG = Question("What is it?", ("a dog",), "a dog"), Question("What is it?", ("a dog",), "wrong")


def make_model(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Says 4, and 0 where "wrong" stands anywhere in the prompt.

    Each word's vector is a unit of its own. The one head looks at all words alike (queries and keys are 0) and adds how often
    "wrong" occurs to the unit of "0"; the last layer knows which word follows which.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=["<judge>"],
    )
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=4096, eos_token_id=2, pad_token_id=0, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
        model.model.embed_tokens.weight[:, : len(WORDS)] = torch.eye(len(WORDS))
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight[15, 8] = 1.0
        attention.o_proj.weight[15, 15] = 1.0
        follows = {0: 2, 1: 4, 2: 2, 3: 4, 4: 5, 5: 7, 6: 7, 7: 2, 8: 4}
        for last, following in follows.items():
            model.lm_head.weight[following, last] = 10.0
        model.lm_head.weight[6, 4] = 9.0
        model.lm_head.weight[6, 15] = 300.0
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("judge") / "model")


def test_it_rates_what_it_reads_alone_and_in_batches(folder: Path):
    # Prompts of very different lengths: what fills the shorter ones up must not be read.
    asked = [WRONG, RIGHT, Question("Why? " * 60, ("so",), "so"), Question("Why? " * 60, ("so",), "wrong"), WRONG]
    told: list[int] = []
    judge = make_judge({"kind": "local", "model": str(folder), "device": "cpu", "batch_size": 4, "max_tokens": 8})
    verdicts = judge.judge(asked, lambda place, verdict: told.append(place))
    assert [verdict.score for verdict in verdicts] == [0, 4, 4, 0, 0]
    assert verdicts[1] == Verdict(4, '{"score": 4 }')
    assert sorted(told) == [0, 1, 2, 3, 4]
    alone = make_judge({"kind": "local", "model": str(folder), "device": "cpu", "batch_size": 1, "max_tokens": 8})
    assert alone.judge(asked) == verdicts
    judge.close()
    assert judge.judge([WRONG])[0].score == 0


@pytest.mark.parametrize("template", [NO_SYSTEM, None])
def test_templates_without_a_system_turn_and_no_template(tmp_path: Path, template: str | None):
    make_model(tmp_path / "model", template)
    judge = make_judge({"kind": "local", "model": str(tmp_path / "model"), "device": "cpu", "max_tokens": 8})
    if template is None:  # the prompt then ends with the instruction, after which the handmade model says the same
        assert [verdict.score for verdict in judge.judge([RIGHT])] == [4]
    else:
        assert [verdict.score for verdict in judge.judge([RIGHT, WRONG])] == [4, 0]


def test_a_model_that_babbles_is_unparsable(tmp_path: Path, folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[4] = 0.0
        model.lm_head.weight[7] = 5.0
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "model")
    judge = make_judge({"kind": "local", "model": str(tmp_path / "model"), "device": "cpu", "max_tokens": 3})
    (verdict,) = judge.judge([RIGHT])
    assert verdict.unparsable
    assert (verdict.points, verdict.text) == (0, "}")


def test_a_model_that_is_not_there(tmp_path: Path):
    judge = make_judge({"kind": "local", "model": str(tmp_path / "nothing")})
    assert judge.judge([]) == []
    with pytest.raises(JudgeError, match="cannot be loaded"):
        judge.judge([RIGHT])


def test_its_settings_are_its_identity():
    one = make_judge({"kind": "local", "model": "m"}).identity
    assert make_judge({"kind": "local", "model": "m", "batch_size": 2, "device": "cpu"}).identity == one
    for change in ({"dtype": "float32"}, {"max_tokens": 4}, {"chat_template_kwargs": {"enable_thinking": False}}):
        assert make_judge({"kind": "local", "model": "m", **change}).identity != one
