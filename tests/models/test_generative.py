"""Samples and batches of every class: what is learned, token by token, and what the model gets to see."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from keeplora.errors import KeepLoraError
from keeplora.models.generative import ANSWER, IMAGE, PAD, TEXT, length_grouped, lengths
from tests.models.tiny import pictures

PICTURES = pictures(3)


def turns(*texts):
    roles = ("user", "assistant")
    return [SimpleNamespace(role=roles[i % 2], text=text) for i, text in enumerate(texts)]


# several turns; two pictures; no picture; a system turn
CASES = {
    "turns": (turns("<image>\nwhat is the animal", "a small cat", "and the colour", " red\n"), PICTURES[:1]),
    "two": (turns("<image>a dog <image>?", "two birds"), PICTURES[1:]),
    "text": (turns("one plus one", "Zürich"), []),
}

_LLAVA, _NEXT, _OV, _INTERN = ("<image>" * n for n in (16, 72, 17, 0))
_OV_SINGLE, _INTERN = "<image>" * 72, f"<img>{'<IMG_CONTEXT>' * 12}</img>"
_QWEN = f"<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>"
_QWEN_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_GEMMA = f"\n\n<start_of_image>{'<image_soft_token>' * 4}<end_of_image>\n\n"
_FAKE, _FOUR = "<fake_token_around_image>", "<image>" * 4
_IDEFICS = (
    f"{_FAKE}<row_1_col_1>{_FOUR}{_FAKE}<row_1_col_2>{_FOUR}\n{_FAKE}<row_2_col_1>{_FOUR}{_FAKE}<row_2_col_2>{_FOUR}\n"
    f"\n{_FAKE}<global-img>{_FOUR}{_FAKE}"
)
# Written by hand from each class's template and processor; what is learned stands between « and ».
_SMOL = {
    "turns": (
        f"<|im_start|>User:{_IDEFICS}what is the animal<end_of_utterance>\nAssistant:« a small cat<end_of_utterance>»\n"
        "User: and the colour<end_of_utterance>\nAssistant:« red<end_of_utterance>»"
    ),
    "two": f"<|im_start|>User:{_IDEFICS}a dog {_IDEFICS}?<end_of_utterance>\nAssistant:« two birds<end_of_utterance>»",
    "text": "<|im_start|>User: one plus one<end_of_utterance>\nAssistant:« Zürich<end_of_utterance>»",
}
REFERENCE = {
    "llava": {
        "turns": (
            f"<s>USER: {_LLAVA}\nwhat is the animal ASSISTANT:« a small cat</s>»USER: and the colour ASSISTANT:« red</s>»"
        ),
        "two": f"<s>USER: {_LLAVA}\n{_LLAVA}\na dog  ? ASSISTANT:« two birds</s>»",
        "text": "<s>USER: one plus one ASSISTANT:« Zürich</s>»",
    },
    "llava-next": {
        "turns": (
            f"<s>[INST] {_NEXT}\nwhat is the animal [/INST]« a small cat</s>» [INST] and the colour [/INST]« red</s>»"
        ),
        "two": f"<s>[INST] {_NEXT}\n{_NEXT}\na dog ? [/INST]« two birds</s>»",
        "text": "<s>[INST] one plus one [/INST]« Zürich</s>»",
    },
    "llava-onevision": {
        "turns": (
            f"<|im_start|>user {_OV_SINGLE}\nwhat is the animal<|im_end|><|im_start|>assistant \n«a small cat<|im_end|>»"
            "<|im_start|>user \nand the colour<|im_end|><|im_start|>assistant\n«red<|im_end|>»"
        ),
        "two": (f"<|im_start|>user {_OV}{_OV}\na dog \n?<|im_end|><|im_start|>assistant\n«two birds<|im_end|>»"),
        "text": "<|im_start|>user \none plus one<|im_end|><|im_start|>assistant\n«Zürich<|im_end|>»",
    },
    "qwen2-5-vl": {
        "turns": (
            f"{_QWEN_SYSTEM}<|im_start|>user\n{_QWEN}what is the animal<|im_end|>\n<|im_start|>assistant\n"
            "«a small cat<|im_end|>»\n<|im_start|>user\nand the colour<|im_end|>\n<|im_start|>assistant\n«red<|im_end|>»"
        ),
        "two": (
            f"{_QWEN_SYSTEM}<|im_start|>user\n{_QWEN}a dog {_QWEN}?<|im_end|>\n<|im_start|>assistant\n"
            "«two birds<|im_end|>»"
        ),
        "text": (f"{_QWEN_SYSTEM}<|im_start|>user\none plus one<|im_end|>\n<|im_start|>assistant\n«Zürich<|im_end|>»"),
    },
    "idefics3": _SMOL,
    "smolvlm": _SMOL,
    "gemma3": {
        "turns": (
            f"<bos><start_of_turn>user\n{_GEMMA}what is the animal<end_of_turn>\n<start_of_turn>model\n"
            "«a small cat<end_of_turn>»\n<start_of_turn>user\nand the colour<end_of_turn>\n<start_of_turn>model\n"
            "«red<end_of_turn>»"
        ),
        "two": (
            f"<bos><start_of_turn>user\n{_GEMMA}a dog{_GEMMA}?<end_of_turn>\n<start_of_turn>model\n"
            "«two birds<end_of_turn>»"
        ),
        "text": "<bos><start_of_turn>user\none plus one<end_of_turn>\n<start_of_turn>model\n«Zürich<end_of_turn>»",
    },
    "internvl": {
        "turns": (
            f"<|im_start|>user\n{_INTERN}\nwhat is the animal<|im_end|>\n<|im_start|>assistant\n«a small cat<|im_end|>»\n"
            "<|im_start|>user\nand the colour<|im_end|>\n<|im_start|>assistant\n«red<|im_end|>»"
        ),
        "two": (
            f"<|im_start|>user\n{_INTERN}\na dog {_INTERN}\n?<|im_end|>\n<|im_start|>assistant\n«two birds<|im_end|>»"
        ),
        "text": "<|im_start|>user\none plus one<|im_end|>\n<|im_start|>assistant\n«Zürich<|im_end|>»",
    },
}
REFERENCE["video-llava"] = REFERENCE["llava"]
REFERENCE["llava-next-video"] = {case: text.replace(_LLAVA, _NEXT) for case, text in REFERENCE["llava"].items()}
REFERENCE["qwen3-vl"] = {case: text.removeprefix(_QWEN_SYSTEM) for case, text in REFERENCE["qwen2-5-vl"].items()}
PLACEHOLDER = {
    "qwen2-5-vl": "<|image_pad|>",
    "qwen3-vl": "<|image_pad|>",
    "gemma3": "<image_soft_token>",
    "internvl": "<IMG_CONTEXT>",
}


def reference(family, text):
    """(ids, whether each is learned), from the marked text, piece by piece."""
    ids, learned = [], []
    for i, piece in enumerate(text.replace("»", "«").split("«")):
        tokens = family.tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += tokens
        learned += [i % 2 == 1] * len(tokens)
    return torch.tensor([ids]), torch.tensor([learned])


def encoded(family, *names, answers=True):
    return [family.encode(*CASES[name], where=name, answers=answers) for name in names or CASES]


@pytest.mark.parametrize("case", CASES)
def test_the_answers_tokens_alone_are_learned(kind, generative, case):
    family = generative(kind)
    item = family.encode(*CASES[case], where=case)
    ids, learned = reference(family, REFERENCE[kind][case])
    assert item["input_ids"].tolist() == ids.tolist()
    assert item["labels"].tolist() == torch.where(learned, ids, -100).tolist()
    shown = ids == family.tokenizer.convert_tokens_to_ids(PLACEHOLDER.get(kind, "<image>"))
    kinds = torch.where(learned, ANSWER, torch.where(shown, IMAGE, TEXT))
    assert item["token_kinds"].tolist() == kinds.tolist()
    assert item["token_kinds"].dtype == torch.uint8
    assert bool(shown.any()) == bool(CASES[case][1])


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_is_the_beginning_of_what_is_learned(kind, generative, case):
    family = generative(kind)
    said, asked = family.encode(*CASES[case]), family.encode(*CASES[case], answers=False)
    length = asked["input_ids"].shape[1]
    assert said["input_ids"][:, :length].tolist() == asked["input_ids"].tolist()
    assert bool((said["labels"][:, length:] != -100).all())
    assert not bool((asked["labels"] != -100).any())
    assert asked.keys() == said.keys()
    without = family.encode(CASES[case][0][:-1], CASES[case][1], answers=False)
    assert without["input_ids"].tolist() == asked["input_ids"].tolist()


def test_answers_are_found_in_the_text_too(generative):
    # A tokenizer that keeps the space apart from the word must learn it: the prompt ends before it.
    text, spans = generative("llava").chat.whole(CASES["turns"][0])
    assert [text[start:end] for start, end in spans] == [" a small cat</s>", " red</s>"]


def test_a_system_turn_is_not_learned(kind, generative):
    family = generative(kind)
    system = SimpleNamespace(role="system", text="answer with one word")
    plain, told = encoded(family, "text")[0], family.encode([system, *CASES["text"][0]])
    assert "answer with one word" in family.tokenizer.decode(told["input_ids"][0])
    assert told["labels"][told["labels"] != -100].tolist() == plain["labels"][plain["labels"] != -100].tolist()


@pytest.mark.parametrize("side", ["right", "left"])
def test_joined_samples_are_the_processors_batch(kind, generative, side):
    family = generative(kind)
    names = ["turns", "two"]
    joined = family.join(encoded(family, *names), side=side)
    texts = [family.chat.whole(CASES[name][0])[0] for name in names]
    beginning = {"add_special_tokens": False} if texts[0].startswith(family.tokenizer.bos_token or "\0") else {}
    if kind == "video-llava":
        beginning["images_kwargs"] = {"return_legacy_image_output": False}
    own = family.processor(
        text=texts, images=[CASES[name][1] for name in names], return_tensors="pt", padding=True, padding_side=side,
        **beginning,
    )  # fmt: skip
    assert set(joined) - {"labels", "token_kinds"} == set(own)
    assert all(torch.equal(joined[key], own[key]) for key in own)
    assert bool((joined["token_kinds"] == PAD).eq(joined["attention_mask"] == 0).all())
    assert bool((joined["labels"][joined["token_kinds"] == PAD] == -100).all())


def test_samples_with_and_without_pictures_share_a_batch(kind, generative):
    family = generative(kind)
    items = encoded(family, "text", "turns", "text", "two")
    with torch.no_grad():
        together = family.token_losses(family.join(items))
        alone = torch.cat([family.token_losses(item) for item in items])
    assert torch.allclose(together, alone, atol=1e-5)
    # What is padded left is answered alike as well.
    with torch.no_grad():
        left = family.token_losses(family.join(items, side="left"))
    assert torch.allclose(left, alone, atol=1e-4)


def test_pictures_and_their_order_matter(kind, generative):
    family = generative(kind)
    ask, shown = CASES["two"]
    with torch.no_grad():
        there, back = (family.token_losses(family.encode(ask, order)) for order in (shown, shown[::-1]))
    assert (there - back).abs().max() > 1e-3


def test_an_own_field_is_carried_along(generative):
    family = generative("llava")
    items = [item | {"index": torch.tensor([7 + i])} for i, item in enumerate(encoded(family))]
    assert family.join(items)["index"].tolist() == [7, 8, 9]
    with pytest.raises(KeepLoraError, match="no sample"):
        family.join([])
    with pytest.raises(KeepLoraError, match="use 'left' or 'right'"):
        family.join(items, side="top")


def test_masks(kind, generative):
    family = generative(kind)
    batch = family.join(encoded(family))
    prefix = family.towers["language"]
    ((name, mask),) = family.masks(batch).items()
    assert name == prefix
    assert mask.dtype == torch.bool
    assert torch.equal(mask, batch["attention_mask"].bool())
    answers = family.masks(batch, {"text": 0, "image": 0, "answer": 1})[prefix]
    assert answers.dtype == torch.bool
    assert torch.equal(answers, batch["labels"] != -100)
    weighed = family.masks(batch, {"text": 0.5, "image": 0.25})[prefix]
    assert weighed.dtype == torch.float32
    kinds = batch["token_kinds"]
    for token_kind, weight in ((PAD, 0.0), (TEXT, 0.5), (IMAGE, 0.25), (ANSWER, 1.0)):
        assert set(weighed[kinds == token_kind].tolist()) == {weight}
    with pytest.raises(KeepLoraError, match="token_weights has 'picture'"):
        family.masks(batch, {"picture": 1})
    with pytest.raises(KeepLoraError, match="image is -1"):
        family.masks(batch, {"image": -1})


# -- too long ----------------------------------------------------------------------------------------------------


def limited(family, most):
    other = family.around(family.model)
    other.max_length = most
    return other


def test_a_long_conversation_is_cut_at_its_end(kind, generative):
    family = generative(kind)
    whole = family.encode(*CASES["turns"])
    ids, learned = whole["input_ids"], whole["labels"][0] != -100
    most = int(learned.nonzero()[1]) + 1  # two tokens of the first answer
    cut = limited(family, most).encode(*CASES["turns"])
    for key in ("input_ids", "attention_mask", "labels", "token_kinds"):
        assert torch.equal(cut[key], whole[key][:, :most])
    assert all(torch.equal(cut[key], whole[key]) for key in whole if whole[key].shape[:2] != ids.shape)
    with torch.no_grad():
        assert len(family.token_losses(cut)) == 2
    assert torch.equal(limited(family, ids.shape[1]).encode(*CASES["turns"])["input_ids"], ids)


def test_neither_a_picture_nor_every_answer_is_cut_away(kind, generative):
    family = generative(kind)
    whole = family.encode(*CASES["two"])
    last = int((whole["token_kinds"][0] == IMAGE).nonzero()[-1])
    first = int((whole["labels"][0] != -100).nonzero()[0])
    with pytest.raises(KeepLoraError, match=rf"here 3: it is {whole['labels'].shape[1]} tokens .* would cut a picture"):
        limited(family, last).encode(*CASES["two"], where="here 3")
    with pytest.raises(KeepLoraError, match=r"here 3: .* would leave nothing of an answer"):
        limited(family, first).encode(*CASES["two"], where="here 3")
    with pytest.raises(KeepLoraError, match=r"here 3: .* a question cannot be cut"):
        limited(family, first - 1).encode(*CASES["two"], where="here 3", answers=False)


def test_the_tokens_that_close_a_picture_are_not_cut_off(generative):
    family = generative("gemma3")
    whole = family.encode(*CASES["two"])
    closing = int((whole["input_ids"][0] == family.tokenizer.convert_tokens_to_ids("<end_of_image>")).nonzero()[-1])
    with pytest.raises(KeepLoraError, match="would cut a picture"):
        limited(family, closing).encode(*CASES["two"])


# -- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conversation", "shown", "message"),
    [
        (turns("<image>a <image>", "b"), 1, "row 7: 2 <image> in the text but 1 picture;"),
        (turns("a", "b"), 2, "row 7: 0 <image> in the text but 2 pictures;"),
        (turns("a", " \n"), 0, "row 7: turn 2, an answer, is empty"),
        (turns("a", "", "b", "c"), 0, "row 7: turn 2, an answer, is empty"),
        (turns("a", "see <image>"), 1, "row 7: turn 2, an answer, holds <image>"),
        (turns("a"), 0, "row 7: the last turn is the user's"),
        ([], 0, "row 7: the conversation is empty"),
        (turns("<video>a", "b"), 0, "row 7: 1 <video> in the text but 0 videos;"),
        (turns("a", "see <video>"), 0, "row 7: turn 2, an answer, holds <video>; only questions can show a video"),
        ([SimpleNamespace(role="gpt", text="a"), *turns("a", "b")], 0, "row 7: turn 1 has role 'gpt'"),
    ],
)
def test_bad_conversations_name_the_sample(generative, conversation, shown, message):
    with pytest.raises(KeepLoraError, match="^" + message):
        generative("llava").encode(conversation, PICTURES[:shown], where="row 7")


def test_what_only_the_class_refuses_names_the_sample_too(generative):
    said = [SimpleNamespace(role="user", text="a"), SimpleNamespace(role="user", text="b"), *turns("c", "d")]
    with pytest.raises(KeepLoraError, match=r"^row 7: the chat template of .* must alternate"):
        generative("gemma3").encode(said, where="row 7")
    with pytest.raises(KeepLoraError, match=r"^row 7: the text holds '<\|image_pad\|>'"):
        generative("qwen2-5-vl").encode(turns("<|image_pad|> a", "b"), where="row 7")
    thin = PICTURES[0].resize((4000, 4))
    with pytest.raises(KeepLoraError, match=r"^row 7: the processor of .* refuses it: .*aspect ratio"):
        generative("qwen2-5-vl").encode(turns("<image>a", "b"), [thin], where="row 7")


# -- batches of like length --------------------------------------------------------------------------------------


def test_length_grouped():
    sizes = torch.randint(1, 1000, (997,), generator=torch.Generator().manual_seed(1)).tolist()
    indices = list(range(5000, 5997))
    batches = length_grouped(indices, sizes, 4, torch.Generator().manual_seed(0))
    assert sorted(i for batch in batches for i in batch) == indices
    assert [len(b) for b in batches].count(4) == 249
    length_of = dict(zip(indices, sizes))
    padded = sum(len(b) * max(length_of[i] for i in b) for b in batches)
    assert padded < 1.05 * sum(sizes)
    assert max(sizes) in [length_of[i] for i in batches[0]]
    assert batches == length_grouped(indices, sizes, 4, torch.Generator().manual_seed(0))
    assert batches != length_grouped(indices, sizes, 4, torch.Generator().manual_seed(1))
    shuffled = [max(length_of[i] for i in b) for b in batches[1:]]
    assert shuffled != sorted(shuffled)
    assert length_grouped([], [], 4) == []
    with pytest.raises(KeepLoraError, match="at least 1"):
        length_grouped([1], [1], 0)
    with pytest.raises(KeepLoraError, match="1 indices but 2 lengths"):
        length_grouped([1], [1, 2], 1)


def test_lengths_count_the_placeholders(generative):
    family = generative("llava")
    assert lengths(encoded(family, "turns", "text")) == [
        len(family.encode(*CASES[n])["input_ids"][0]) for n in ("turns", "text")
    ]
    assert lengths(encoded(family, "turns"))[0] > 16
