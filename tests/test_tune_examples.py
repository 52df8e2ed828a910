"""Conversations as tokens: what of them is trained on, and how it is batched and weighed."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import tuning
from tuning import tokenizer, write_lines

import quaver as qv
from quaver import tune
from quaver.errors import UsageError
from quaver.tune import chat
from quaver.tune.job import Tuning

base, paths = tuning.base, tuning.paths
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}<end>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def examples(tmp_path, rows, coder=None, **changes):
    path = write_lines(tmp_path / "rows.jsonl", rows)
    settings = tune.Settings(data=(str(path),), eval_data=(str(path),), **changes)
    return chat.load(settings, coder or tokenizer())


def pieces(example, coder):
    """The text of all, and of what is trained on."""
    taught = [label for label in example.labels if label != chat.IGNORED]
    return coder.decode(example.tokens), coder.decode(taught)


def test_the_answers_of_a_plain_layout(tmp_path):
    coder = tokenizer()
    turns = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]  # fmt: skip
    found = examples(tmp_path, [{"prompt": "2+2", "response": "4"}, {"messages": turns}])
    one, two = found.train
    assert pieces(one, coder) == ("user: 2+2\nassistant: 4<end>", " 4<end>")
    whole = "system: be brief\nuser: a\nassistant: b<end>user: c\nassistant: d<end>"
    assert pieces(two, coder) == (whole, " b<end> d<end>")
    assert coder.decode(two.tokens[: two.start]) == whole[: -len(" d<end>")]
    assert one.answers == 3


def test_the_answers_of_a_chat_template(tmp_path):
    coder = tokenizer(chat_template=TEMPLATE)
    turns = [{"role": role, "content": text} for role, text in (
        ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]  # fmt: skip
    rows = [{"q": "2+2", "a": "4"}, {"messages": turns}]
    one, two = examples(tmp_path, rows, coder, prompt_field="q", response_field="a").train
    assert pieces(one, coder) == ("<user>2+2\n<assistant>4<end>\n", "4<end>")
    assert pieces(two, coder)[1] == "b<end>d<end>"
    # A template that has no end for an answer gets the tokenizer's.
    coder = tokenizer(chat_template=TEMPLATE.replace("<end>", ""))
    one, _ = examples(tmp_path, rows, coder, prompt_field="q", response_field="a").train
    assert pieces(one, coder) == ("<user>2+2\n<assistant>4\n<end>", "4\n<end>")
    # One that hides earlier answers: the last one is trained on, the others are counted.
    hides = TEMPLATE.replace("{{ m.content }}", "{% if m.role != 'assistant' or loop.last %}"
                             "{{ m.content }}{% endif %}")  # fmt: skip
    coder = tokenizer(chat_template=hides)
    found = examples(tmp_path, [{"messages": turns}], coder)
    assert pieces(found.train[0], coder)[1] == "d<end>"
    assert "2 earlier answers are no target" in str(found.notes)  # as data and as --eval-data


def test_long_examples_are_cut_or_left_out_and_counted(tmp_path):
    rows = [{"prompt": "a", "response": "b" * 99}, {"prompt": "a" * 99, "response": "b"},
            {"prompt": "a", "response": "b"}]  # fmt: skip
    found = examples(tmp_path, rows, seq=32)
    assert [len(example.tokens) for example in found.train] == [32, 21]
    assert str(found.notes) == (
        "2 examples longer than --seq were cut; 2 left out, since --seq ends before their answer"
    )
    with pytest.raises(UsageError, match="--seq 8 ends before the answer of every example"):
        examples(tmp_path, rows, seq=8)


def test_rows_of_parquet_are_lines_of_jsonl(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"say {i}"},
                          {"role": "assistant", "content": "yes"}]} for i in range(4)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chat.parquet")
    write_lines(tmp_path / "chat.jsonl", rows)
    one, other = (
        chat.load(tune.Settings(data=(str(tmp_path / name),), seq=48), tokenizer())
        for name in ("chat.parquet", "chat.jsonl")
    )
    assert one == other and len(one.train) == 3


def test_batches_are_epochs_that_depend_on_the_seed_alone(tmp_path):
    found = examples(tmp_path, [{"prompt": str(i), "response": "x"} for i in range(5)])
    order = found.batch(3, 0, 5)
    assert set(order) == set(found.train) and found.batch(3, 5, 5) != order
    assert found.batch(3, 2, 6)[:3] == order[2:] and found.batch(4, 0, 5) != order


def test_every_answers_token_counts_alike_over_micro_batches(paths):
    """The gradient of two micro-batches is that of one that holds them both."""

    def grads(batch, accumulate):
        settings = tune.Settings(
            model=str(paths / "model"), data=(str(paths / "chat.jsonl"),), method=("full",),
            batch=batch, accumulate=accumulate, seq=48, recipe="f32", device="cpu",
        )  # fmt: skip
        text = chat.load(settings, tokenizer())
        world = qv.distributed.World(torch.device("cpu"))
        job = Tuning(tune.Run(settings, tokenizer(), text, world), "full")
        loss = job._backward(1, None)
        return loss, {name: p.grad for name, p in job.model.named_parameters()}

    (loss, one), (other, two) = grads(4, 1), grads(2, 2)
    torch.testing.assert_close(loss, other)
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad, atol=1e-6, rtol=1e-4)
